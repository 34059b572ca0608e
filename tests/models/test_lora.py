"""Adapters against diffusers' transformer with adapters made by hand, and against PEFT where it is installed."""

import json

import flux_peer
import peer
import pytest
import te_stand_in
import torch
from lora_peer import adapt_peer, peer_gradients, random_factors
from peer import SMALL, gradient_errors, make_inputs, random_case, relative_error, run_peer, save_peer
from safetensors.torch import save_file

from soar_mega.config import LoraConfig, ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers, load_weights
from soar_mega.convert.adapter_files import open_lora
from soar_mega.models.common.build import build_model
from soar_mega.models.common.lora import Adapters, adapter_pairs, add_adapters
from soar_mega.models.family import read_sizes
from soar_mega.models.sd3.mapping import entries
from soar_mega.models.sd3.presets import PRESETS
from soar_mega.models.sd3.sizes import SD3Sizes

EVERY_LINEAR = ["*"]
CONFIGS = [
    LoraConfig(rank=3, alpha=5.0),
    LoraConfig(rank=2, targets=["*.attn.to_q", "*.attn.to_v", "*.attn2.to_k"]),
    LoraConfig(rank=2, alpha=1.0, targets=EVERY_LINEAR),
]


def with_adapters(model, config: LoraConfig) -> Adapters:
    """Adapters on a single-process model, everything else frozen."""
    model.requires_grad_(False)
    return add_adapters([model], config, seed=1)


def set_factors(model, pairs, config, factors) -> None:
    held = dict(model.named_parameters())
    with torch.no_grad():
        for pair in pairs:
            for entry in pair.entries(config.rank):
                held[entry.name].copy_(factors[entry.keys[0]])


def gradients(model, pairs, config):
    held = dict(model.named_parameters())
    return {e.keys[0]: held[e.name].grad for pair in pairs for e in pair.entries(config.rank)}


def adapted(folder, config, family=peer, **changes):
    """Our model and the peer, with the same adapters."""
    other = family.save_peer(folder, **changes)
    model = load_diffusers(folder)
    adapters = with_adapters(model, config)
    factors = random_factors(adapters.pairs, config.rank)
    set_factors(model, adapters.pairs, config, factors)
    return model, other, adapters, factors


def assert_equal_by_hand(model, other, adapters, factors, config, inputs, family):
    adapt_peer(other, adapters.pairs, factors, config)
    ours, theirs = model(*inputs), family.run_peer(other, inputs)
    assert relative_error(ours, theirs) < 1e-5
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    errors = gradient_errors(gradients(model, adapters.pairs, config), peer_gradients(other, adapters.pairs))
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("config", CONFIGS, ids=["published", "some-of-qkv", "every-linear"])
@pytest.mark.parametrize("seed", [1, 4])
def test_forward_and_every_gradient_equal_adapters_by_hand(config, seed, tmp_path):
    changes, size, batch, text = random_case(seed)
    case = adapted(tmp_path, config, **{**changes, "dual_attention_layers": (0,)})
    assert_equal_by_hand(*case, config, make_inputs(case[0].sizes, size, batch, text), peer)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=["published", "every-linear"])
def test_flux_equals_adapters_by_hand(config, tmp_path):
    case = adapted(tmp_path, config, flux_peer)
    modules = {pair.module for pair in case[2].pairs}
    assert {"transformer_blocks.1.attn.add_q_proj", "single_transformer_blocks.2.attn.to_v"} <= modules
    assert_equal_by_hand(*case, config, flux_peer.make_inputs(case[0].sizes), flux_peer)


def test_forward_equals_peft(tmp_path):
    peft = pytest.importorskip("peft")
    config = CONFIGS[0]
    model, other, adapters, factors = adapted(tmp_path, config, dual_attention_layers=(0,))
    modules = [pair.module for pair in adapters.pairs]
    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=modules)
    other = peft.inject_adapter_in_model(settings, other)
    loaded = peft.set_peft_model_state_dict(other, factors)
    assert not loaded.unexpected_keys
    inputs = make_inputs(model.sizes)
    assert relative_error(model(*inputs), run_peer(other, inputs)) < 1e-5


def test_the_published_targets_of_sd35_medium():
    sizes = PRESETS["sd35_medium"]
    model = build_model(sizes, ModelConfig(), ParallelConfig(), meta=True)
    adapters = with_adapters(model, LoraConfig(rank=32, alpha=64.0))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(adapters.names)
    assert len(trained) == 382
    assert sum(p.numel() for p in trained.values()) == 18_776_064
    assert not any("dual_attention" in name for name in trained)


def test_without_adapters_the_model_is_the_one_before(tmp_path):
    """Fresh adapters change nothing; trained ones are switched off to the bit, and back on."""
    save_peer(tmp_path)
    model = load_diffusers(tmp_path)
    inputs = make_inputs(model.sizes)
    before = model(*inputs)
    adapters = with_adapters(model, CONFIGS[0])
    assert torch.equal(model(*inputs), before)
    pairs = adapter_pairs(entries(model.sizes), CONFIGS[0].targets)
    set_factors(model, pairs, CONFIGS[0], random_factors(pairs, CONFIGS[0].rank))
    with_them = model(*inputs)
    assert relative_error(with_them, before) > 0.01
    with adapters.switched(False):
        assert torch.equal(model(*inputs), before)
        with adapters.switched(True):
            assert torch.equal(model(*inputs), with_them)
        assert torch.equal(model(*inputs), before)
    assert torch.equal(model(*inputs), with_them)


def test_a_target_that_matches_nothing_is_named():
    with pytest.raises(
        ValueError, match=r"lora.targets: 'to_q' matches no linear.*transformer_blocks.\*.attn.to_q"
    ):
        adapter_pairs(entries(SD3Sizes(**SMALL)), ["to_q"])


def test_a_target_that_is_computed_in_parts_is_named():
    """FLUX's proj_out of attention and MLP side by side. A pattern that means more leaves it out."""
    sizes = read_sizes({"_class_name": "FluxTransformer2DModel", **flux_peer.SMALL})
    table = sizes.family.entries(sizes)
    with pytest.raises(ValueError, match=r"single_transformer_blocks.0.proj_out is computed in two parts"):
        adapter_pairs(table, ["*.proj_out"])
    assert not any(pair.module.endswith(".proj_out") for pair in adapter_pairs(table, EVERY_LINEAR))


def test_merged_weights_are_the_adapted_model(tmp_path):
    model, _, adapters, _ = adapted(tmp_path, CONFIGS[2])
    tensors = adapters.merged(dict(model.named_parameters()).__getitem__)
    plain = load_diffusers(tmp_path)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.copy_(tensors(name))
    inputs = make_inputs(model.sizes)
    assert relative_error(model(*inputs), plain(*inputs)) < 1e-5


def test_adapters_of_unknown_scale_or_on_changed_weights_are_refused(tmp_path):
    file, config = tmp_path / "step-9.safetensors", tmp_path / "adapter_config.json"
    shapes = {"A": (2, 3), "B": (4, 2)}
    save_file({f"base_model.model.x.lora_{which}.weight": torch.ones(shapes[which]) for which in "AB"}, file)
    with pytest.raises(ValueError, match=r"adapter_config.json cannot be read .*alpha of the adapters"):
        open_lora(file)
    for kind in ("pissa_niter_16", "olora", "corda", "loftq", "lora_ga"):
        config.write_text(json.dumps({"r": 2, "lora_alpha": 4, "init_lora_weights": kind}))
        with pytest.raises(ValueError, match=rf"init_lora_weights='{kind}', so they are on changed weights"):
            open_lora(file)
    for kind in (True, "gaussian", "eva", None):
        config.write_text(json.dumps({"r": 2, "lora_alpha": 4, "init_lora_weights": kind}))
        assert open_lora(file).alpha == 4.0
    for alpha in (None, "4", [4], float("nan")):
        config.write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        with pytest.raises(ValueError, match="lora_alpha is .*, a number is expected"):
            open_lora(file)
    save_file({f"base_model.model.x.lora_{which}.weight": torch.ones(()) for which in "AB"}, file)
    with pytest.raises(ValueError, match="says rank 2, its tensors have rank 0"):
        open_lora(file)


def test_dropout_leaves_out_features_of_a_step(tmp_path):
    """A share of each pair's input features, others at each step, in training alone, with the sum kept on average."""
    config = LoraConfig(rank=2, dropout=0.25)
    save_peer(tmp_path)
    model = load_diffusers(tmp_path)
    adapters = with_adapters(model, config)
    pairs = adapter_pairs(entries(model.sizes), config.targets)
    set_factors(model, pairs, config, random_factors(pairs, config.rank))
    inputs = make_inputs(model.sizes)
    without = model(*inputs).detach()
    adapters.drop(seed=1, position=7)
    first = [one.kept.clone() for one in adapters.members.values()]
    dropped = model(*inputs)
    assert relative_error(dropped, without) > 1e-3
    with torch.no_grad():
        assert torch.equal(model(*inputs), without)
    # by hand: A without the features, and the rest counts more
    held = dict(model.named_parameters())
    with torch.no_grad():
        for one, kept in zip(adapters.members.values(), first, strict=True):
            for pair, mask in zip(one.pairs, kept, strict=True):
                held[pair.entries(2)[0].name].mul_(mask / 0.75)
        assert relative_error(dropped, model(*inputs)) < 1e-5
    adapters.drop(seed=1, position=8)
    second = [one.kept.clone() for one in adapters.members.values()]
    adapters.drop(seed=1, position=7)
    assert all(torch.equal(one.kept, was) for one, was in zip(adapters.members.values(), first, strict=True))
    a, b = torch.cat([m.flatten() for m in first]), torch.cat([m.flatten() for m in second])
    assert not torch.equal(a, b)
    assert a.mean() == pytest.approx(0.75, abs=0.05)
    rows = torch.cat([m for m in first if m.shape[1] == first[0].shape[1]])
    assert len(rows.unique(dim=0)) == len(rows)  # each pair has its own


@pytest.mark.parametrize(("dtype", "fp8", "close"), [("fp32", None, 1e-5), ("bf16", "hybrid", 0.05)])
@pytest.mark.parametrize("family", [peer, flux_peer], ids=["sd3", "flux"])
def test_adapters_on_transformer_engine_s_linears(family, dtype, fp8, close, tmp_path, monkeypatch):
    """Over the stand-in: adapters compute and learn beside what FP8 casts as they do beside torch's linears."""
    config = CONFIGS[0]
    family.save_peer(tmp_path)
    model = load_diffusers(tmp_path, dtype)
    te_stand_in.install(monkeypatch)
    settings = ModelConfig(dtype=dtype, transformer_impl="transformer_engine", fp8=fp8)
    other = build_model(model.sizes, settings, ParallelConfig())
    load_weights(other, tmp_path)
    inputs, velocities, learnt = family.make_inputs(model.sizes), [], []
    for each in (other, model):
        adapters = with_adapters(each, config)
        set_factors(each, adapters.pairs, config, random_factors(adapters.pairs, config.rank))
        velocities.append(each(*inputs))
        velocities[-1].square().sum().backward()
        learnt.append(gradients(each, adapters.pairs, config))
    assert relative_error(*velocities) < close
    assert max(gradient_errors(*learnt).values()) < close
