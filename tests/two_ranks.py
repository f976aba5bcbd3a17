"""Started by torchrun: the toy training on two processes, which must hold the same parameters after every update."""

import torch

from alignkit import config
from tests.toy import ToyConfig, toy_params, train

params = toy_params()


def body(run, step):
    assert run.num_processes == 2
    for name, parameter in params.items():
        one, two = run.gather(parameter.detach()[None])
        assert torch.equal(one, two), f"step {step}: {name} differs between the processes"


run = train(config.parse(ToyConfig), params, body=body)
if run.is_main:
    print("two processes, equal parameters")
