"""Started by torchrun: the toy training on two processes, with the most bytes that its steps hold in each of them."""

from alignkit import config, plan
from tests.toy import ToyConfig, toy_params, train

WIDTH = 2**16  # so that the parameters are what counts


def peak(cfg: ToyConfig) -> tuple[plan.Ledger, int]:
    """The ledger of the training, and the bytes of what is trained."""
    with plan.Ledger("cpu") as ledger:
        params = toy_params(WIDTH)
        run = train(cfg, params)
    return ledger, sum(p.nbytes for p in run.params.values())


if __name__ == "__main__":
    ledger, _ = peak(config.parse(ToyConfig))
    print(f"peak {ledger.phases['train'].peak}", flush=True)
