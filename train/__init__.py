"""Training: the loop, its state, its schedule, its checkpoints, and the command lines over them.

pretrain.py  evaluate.py   command lines
loop.py                    fit(): accumulate, clip, guard, step, outer, log, evaluate, save
state.py                   everything that a run must remember
rundir.py                  what a run's folder holds
"""
