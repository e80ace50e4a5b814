"""Sample text: what the model makes of the first held-out tokens."""

from __future__ import annotations

from dataset.tokenizers import Tokenizer
from dataset.views import View
from model.schema import Config
from train import optim
from train.metrics import Log
from train.sharding import settle, sharded
from train.state import TrainState
from train.world import World, autocast

PROMPT = 32  # tokens
LENGTH = 120  # new tokens at the end of a run


def sample(
    state: TrainState,
    config: Config,
    heldout: View | None,
    tokenizer: Tokenizer,
    log: Log,
    world: World,
    new: int = LENGTH,
) -> None:
    """Continue the first held-out text by `new` tokens and record it; a model that cannot is no error."""
    if heldout is None or not (world.main or sharded(state.model)):
        return
    prompt = heldout.batch(0, 1).tokens[:, : min(PROMPT, config.run.context)].to(world.device)
    with optim.averaged(state.optimizer), autocast(world.device, config.run.precision):
        try:
            state.model.init_state(1)
        except ValueError as error:  # a router that looks ahead: trained, but not to be run token by token
            log.say(f"no sample text: {error}")
            return
        out = state.model.generate(prompt, max_new_tokens=new, temperature=0.8, top_p=0.95, seed=0)
    settle(state.model)
    ids = out[0].tolist()
    decode, cut = tokenizer.decode, prompt.shape[1]
    log.write("sample", state.step, tokens=state.tokens, prompt=decode(ids[:cut]), text=decode(ids[cut:]))
