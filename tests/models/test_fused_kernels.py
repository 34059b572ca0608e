"""The model on its kernels: as plain torch calls, as eager twins, and as interpreted Triton."""

import pytest
import torch
from peer import gradient_errors, make_inputs, relative_error, save_peer

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers, load_weights
from soar_mega.models.common.build import build_model


def run(model):
    velocity = model(*make_inputs(model.sizes))
    velocity.square().sum().backward()
    return velocity.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("peer")
    save_peer(path, num_layers=2, dual_attention_layers=(0,))
    return path


@pytest.fixture(scope="module")
def plain(folder):
    sizes = load_diffusers(folder).sizes
    model = build_model(sizes, ModelConfig(dtype="fp32", fused_kernels=False), ParallelConfig())
    load_weights(model, folder)
    return run(model)


def test_eager_twins_equal_plain_calls(folder, plain):
    velocity, gradients = run(load_diffusers(folder))
    assert torch.equal(velocity, plain[0])
    assert max(gradient_errors(gradients, plain[1]).values()) < 1e-6


def test_interpreted_triton_equals_plain_calls(folder, plain, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    velocity, gradients = run(load_diffusers(folder))
    assert not torch.equal(velocity, plain[0])  # another way of computing indeed
    assert relative_error(velocity, plain[0]) < 1e-5
    assert max(gradient_errors(gradients, plain[1]).values()) < 1e-5
