"""Started by torchrun: the toy training on two processes, with the most bytes that its steps hold in each of them."""

from alignkit import config, plan
from tests.toy import ToyConfig, toy_params, train

WIDTH = 2**16  # so that the parameters are what counts


def bytes_held(cfg: ToyConfig) -> dict[str, int]:
    """At most in a step, between steps, and of it what is trained: the arguments of `plan.peak_of_several`."""
    with plan.Ledger("cpu") as ledger:
        run = train(cfg, toy_params(WIDTH))
        trained = sum(p.nbytes for p in run.params.values())
        return {"peak": ledger.phases["train"].peak, "live": ledger.live, "trained": trained}


if __name__ == "__main__":
    print(f"peak {bytes_held(config.parse(ToyConfig))['peak']}", flush=True)
