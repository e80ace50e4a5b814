"""Outer loops: what workers tell each other every so many inner steps. See README.md.

none.py  diloco.py  streaming.py  asynchronous.py     one file each, behind one interface (`NoOuter`)
rules.py  codec.py  layout.py  arrays.py              arithmetic, wire formats, which tensors travel
lockstep.py  exchange.py                              what meets: replicas, the mean over workers
coordinator.py  simulate.py                           async as a state machine, a virtual clock
frames.py  journal.py  server.py  client.py           the same over TCP
team.py                                               workers of a launch: groups, folders, identity
watch.py                                              command lines: serve, status HOST:PORT
"""
