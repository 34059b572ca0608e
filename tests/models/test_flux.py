"""FLUX as a single process against diffusers, and what it does with impossible input."""

import random
from pathlib import Path

import pytest
import torch
from flux_peer import SMALL, make_inputs, make_peer, random_case, run_peer, save_peer
from peer import gradient_errors, relative_error, to_peer_names
from test_flops import counting

from soar_mega.config import ModelConfig, ParallelConfig
from soar_mega.convert import load_diffusers, load_weights
from soar_mega.convert.safetensors_reader import Reader
from soar_mega.convert.save import write_transformer
from soar_mega.models.common.build import build_model
from soar_mega.models.common.flops import Tokens, forward_work, recomputed_work
from soar_mega.models.common.gather import full_shape
from soar_mega.models.common.names import named_tensors
from soar_mega.models.common.summary import meta_model
from soar_mega.models.common.tensor_map import key_shapes
from soar_mega.models.family import read_sizes
from soar_mega.models.flux.joined import join
from soar_mega.models.flux.mapping import entries
from soar_mega.models.flux.presets import PRESETS
from soar_mega.models.flux.rope import rotation

DATA = Path(__file__).parent / "data"


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def run(model, inputs):
    velocity = model(*inputs)
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(2))
    (velocity * weights).sum().backward()
    found = gradients(model)
    model.zero_grad()
    return velocity.detach(), found


@pytest.mark.parametrize("seed", range(6))
def test_forward_and_every_gradient_equal_diffusers(seed, tmp_path):
    changes, size, batch, text = random_case(seed)
    peer = save_peer(tmp_path, seed, **changes)
    model = build_model(
        read_sizes(tmp_path), ModelConfig(dtype="fp32", fused_kernels=seed < 3), ParallelConfig()
    )
    load_weights(model, tmp_path)
    inputs = make_inputs(model.sizes, size, batch, text)
    ours, theirs = model(*inputs), run_peer(peer, inputs)
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert relative_error(ours, theirs) < 1e-5
    weights = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2))
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    errors = gradient_errors(to_peer_names(model.sizes, gradients(model)), gradients(peer))
    assert max(errors.values()) < 1e-5, sorted(errors.items(), key=lambda item: -item[1])[:5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    save_peer(path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"recompute_granularity": "full", "recompute_every": 2},
        {"recompute_granularity": "selective"},
        {"dtype": "bf16"},
        {"interpreted": True},
        {"padded": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_ways_of_computing_the_same(changes, folder, monkeypatch):
    plain = load_diffusers(folder)
    velocity, wanted = run(plain, make_inputs(plain.sizes))
    if changes.get("interpreted"):
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings = {key: value for key, value in changes.items() if key not in ("interpreted", "padded")}
    model = build_model(plain.sizes, ModelConfig(**{"dtype": "fp32", **settings}), ParallelConfig())
    load_weights(model, folder)
    if changes.get("padded"):  # as for FP8, which does nothing itself without Transformer Engine
        model.config.fp8, model.config.fp8_recipe = "hybrid", "tensorwise"
        assert model.pipeline_sequence_length((8, 6), 5) == 16 + 16 + 1
    found_velocity, found = run(model, make_inputs(model.sizes))
    if model.config.bf16:
        assert relative_error(found_velocity, velocity) < 0.05
        return
    if changes.get("interpreted"):
        assert not torch.equal(found_velocity, velocity)  # another way of computing indeed
    assert relative_error(found_velocity, velocity) < 1e-5
    assert max(gradient_errors(found, wanted).values()) < 1e-5


def test_weights_come_back_as_they_were(folder, tmp_path):
    write_transformer(load_diffusers(folder), tmp_path)
    with Reader(folder / "transformer") as given, Reader(tmp_path) as written:
        assert given.files.keys() == written.files.keys()
        assert all(torch.equal(given.read(key), written.read(key)) for key in given.files)
    assert read_sizes(tmp_path) == read_sizes(folder)
    make_peer().from_pretrained(tmp_path)


GUIDANCE = 3072 * (256 + 3072 + 2)  # parameters of the guidance embedder


@pytest.mark.parametrize(
    "name, keys, parameters",
    [("flux_dev", 1160, 11_901_408_320), ("flux_schnell", 1156, 11_901_408_320 - GUIDANCE)],
)
def test_published_keys_and_shapes(name, keys, parameters):
    sizes = PRESETS[name]
    model, table = meta_model(sizes), entries(sizes)
    lines = (DATA / "flux_dev_keys.txt").read_text().splitlines()
    reference = dict(line.split("\t") for line in lines)
    if not sizes.guidance_embeds:
        reference = {key: shape for key, shape in reference.items() if "guidance" not in key}
    assert {key: str(shape) for key, shape in key_shapes(table).items()} == reference
    assert len(reference) == keys
    ours = {n: tuple(full_shape(t)) for n, t in named_tensors(model).items()}
    assert ours == {e.name: (e.shape[0] * len(e.keys), *e.shape[1:]) for e in table}
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("seed", range(4))
def test_work_is_what_torch_counts(seed):
    changes, size, batch, text = random_case(seed)
    sizes = read_sizes({"_class_name": "FluxTransformer2DModel", **SMALL, **changes})
    tokens = Tokens(size[0] * size[1] // 4, text)
    granularity, every = [("none", 1), ("full", 1), ("full", 2), ("selective", 1)][seed]
    settings = ModelConfig(dtype="fp32", recompute_granularity=granularity, recompute_every=every)
    model = build_model(sizes, settings, ParallelConfig(), meta=True)
    inputs = [x.to("meta") for x in make_inputs(sizes, size, batch, text)]
    with counting() as counter:
        velocity = model(*inputs)
    forward = forward_work(sizes, tokens)
    assert counter.get_total_flops() == batch * forward.total
    with counting() as counter:
        velocity.sum().backward()
    again = recomputed_work(sizes, tokens, settings)
    assert counter.get_total_flops() == batch * (forward.backward + again).total


def test_rotation_equals_diffusers():
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    rows, columns, text = 5, 3, 4
    places = [(0, 0, 0)] * text + [(0, row, column) for row in range(rows) for column in range(columns)]
    wanted = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 8])(torch.tensor(places, dtype=torch.float32))
    order = (range(2, 9), range(2))
    found = rotation((4, 6, 8), text, (rows, columns), order, torch.device("cpu"))
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, torch.cat([theirs[2:9], theirs[0:2]]))


@pytest.mark.parametrize("seed", range(20))
def test_joined_streams_lie_as_the_ranks_have_them(seed):
    """Against gathering the shards of two padded streams, token by token."""
    draw = random.Random(seed)
    text, image, shards = draw.randint(1, 9), draw.randint(1, 9), draw.choice([1, 2, 4])
    parts = [-(-length // shards) + draw.choice([0, 2]) for length in (text, image)]
    padding = -1
    streams = []
    for tokens, part in zip((range(text), range(text, text + image)), parts):
        streams.append([*tokens, *[padding] * (part * shards - len(tokens))])
    gathered = []
    for rank in range(shards):
        for stream, part in zip(streams, parts):
            gathered += stream[part * rank : part * (rank + 1)]
    joined = join(text, image, *parts, shards)
    assert [place for places in joined.order for place in places] == [n for n in gathered if n != padding]
    marks = [mark for tokens, behind in joined.runs for mark in [True] * tokens + [False] * behind]
    assert marks == [n != padding for n in gathered]
    tokens = torch.arange(text + image).view(-1, 1, 1) + 1
    found = joined.put_back(tokens).flatten()
    assert found.ne(0).tolist() == marks and found[found != 0].tolist() == list(range(1, text + image + 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes_dims_rope": (2, 2, 2)}, "together they must be attention_head_dim = 8"),
        ({"axes_dims_rope": (4, 4)}, "three even numbers"),
        ({"axes_dims_rope": (3, 3, 2)}, "three even numbers"),
        ({"axes_dims_rope": 8}, "a list of numbers"),
        ({"in_channels": 6}, "in_channels is 6: it must be a multiple of 4"),
        ({"patch_size": 2}, "patch_size is 2"),
        ({"in_channels": 384, "out_channels": 64}, "Fill, Depth or Canny"),
        ({"guidance_embeds": 1}, "guidance_embeds is 1"),
        ({"num_single_layers": 0}, "num_single_layers is 0"),
        ({"theta": 5}, "settings that this model does not know: theta"),
    ],
)
def test_impossible_sizes(changes, message):
    with pytest.raises(ValueError, match=message):
        read_sizes({"_class_name": "FluxTransformer2DModel", **SMALL, **changes})


def test_latents_that_cannot_be_cut(folder):
    model = load_diffusers(folder)
    with pytest.raises(ValueError, match="latents of 8 x 5: each side must be a multiple of 2$"):
        model(*make_inputs(model.sizes, (8, 5)))
