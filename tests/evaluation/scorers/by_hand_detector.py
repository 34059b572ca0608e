"""mmdetection's Mask2Former with a Swin backbone in float64, on weights under its own names."""

import math
from collections.abc import Mapping

import torch
from by_hand import attend, gelu, linear, norm
from torch import Tensor
from torch.nn.functional import conv2d, grid_sample, group_norm, interpolate, pad, relu, unfold

State = Mapping[str, Tensor]
HEADS, LEVELS, POINTS = 8, 3, 4


def detect(
    state: State, pixels: Tensor, depths: list[int], heads: list[int], window: int
) -> tuple[Tensor, Tensor]:
    """Logits of the last layer, of classes [Q, classes + 1] and of masks [Q, h, w], for an image [3, H, W]."""
    features = swin(state, pixels.double(), depths, heads, window)
    mask_feature, levels = pixel_decoder(state, features)
    return queries(state, mask_feature, levels)


def swin(state: State, x: Tensor, depths: list[int], heads: list[int], window: int) -> list[Tensor]:
    """[3, H, W] -> [C, h, w] of each stage"""
    weight, bias = (state[f"backbone.patch_embed.projection.{kind}"].double() for kind in ("weight", "bias"))
    x = norm(state, "backbone.patch_embed.norm", conv2d(x[None], weight, bias, stride=4)[0].permute(1, 2, 0))
    features = []
    for stage, depth in enumerate(depths):
        for layer in range(depth):
            block = f"backbone.stages.{stage}.blocks.{layer}"
            shift = window // 2 if layer % 2 else 0
            y = norm(state, f"{block}.norm1", x)
            x = x + window_attention(state, f"{block}.attn.w_msa", y, heads[stage], window, shift)
            y = gelu(linear(state, f"{block}.ffn.layers.0.0", norm(state, f"{block}.norm2", x)))
            x = x + linear(state, f"{block}.ffn.layers.1", y)
        features.append(norm(state, f"backbone.norm{stage}", x).permute(2, 0, 1))
        if stage < len(depths) - 1:
            merge = f"backbone.stages.{stage}.downsample"
            height, width = x.shape[0] // 2, x.shape[1] // 2
            x = unfold(x.permute(2, 0, 1)[None], 2, stride=2)[0].T.view(height, width, -1)
            x = norm(state, f"{merge}.norm", x) @ state[f"{merge}.reduction.weight"].double().T
    return features


def window_attention(state: State, name: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    """[H, W, C] -> [H, W, C], each token among those of its window, and after a shift only among former neighbours."""
    height, width = x.shape[:2]
    x = pad(x, (0, 0, 0, -width % window, 0, -height % window)).roll((-shift, -shift), (0, 1))
    rows, columns = x.shape[:2]
    out = torch.empty_like(x)
    offsets = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1)
    offsets = offsets.view(-1, 2)
    difference = offsets[:, None] - offsets[None] + window - 1
    table = state[f"{name}.relative_position_bias_table"].double()
    bias = table[difference[..., 0] * (2 * window - 1) + difference[..., 1]]  # [T, T, heads]

    def region(place: int, length: int) -> int:
        return 0 if place < length - window else 1 if place < length - shift else 2

    for top in range(0, rows, window):
        for left in range(0, columns, window):
            tokens = x[top : top + window, left : left + window].reshape(window**2, -1)
            q, k, v = linear(state, f"{name}.qkv", tokens).chunk(3, -1)
            regions = torch.tensor(
                [3 * region(top + int(i), rows) + region(left + int(j), columns) for i, j in offsets]
            )
            apart = -100.0 * (regions[:, None] != regions[None]) if shift else 0.0
            parts = [
                attend(q1, k1, v1, 1, bias[..., head] + apart)
                for head, (q1, k1, v1) in enumerate(
                    zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1))
                )
            ]
            answer = linear(state, f"{name}.proj", torch.cat(parts, -1))
            out[top : top + window, left : left + window] = answer.view(window, window, -1)
    return out.roll((shift, shift), (0, 1))[:height, :width]


def positions(height: int, width: int, channels: int) -> Tensor:
    """[channels, height, width]: the sines of the row first, then of the column."""
    parts = []
    for axis, length in ((0, height), (1, width)):
        place = torch.arange(1, length + 1, dtype=torch.float64) / (length + 1e-6) * 2 * math.pi
        place = place[:, None].expand(-1, width) if axis == 0 else place[None].expand(height, -1)
        for i in range(channels // 2):
            angle = place / 10000 ** (2 * (i // 2) / (channels // 2))
            parts.append(angle.cos() if i % 2 else angle.sin())
    return torch.stack(parts)


def convolved(state: State, name: str, x: Tensor, bias: bool) -> Tensor:
    weight = state[f"{name}.conv.weight"].double()
    shift = state[f"{name}.conv.bias"].double() if bias else None
    y = conv2d(x[None], weight, shift, padding=weight.shape[-1] // 2)
    return group_norm(y, 32, state[f"{name}.gn.weight"].double(), state[f"{name}.gn.bias"].double())[0]


def pixel_decoder(state: State, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The feature of the masks [C, h, w] and three levels from coarse to fine."""
    name = "panoptic_head.pixel_decoder"
    maps = [convolved(state, f"{name}.input_convs.{i}", features[3 - i], True) for i in range(LEVELS)]
    sizes = [level.shape[1:] for level in maps]
    tokens = torch.cat([level.flatten(1).T for level in maps])
    encoding = state[f"{name}.level_encoding.weight"].double()
    places = torch.cat(
        [positions(*size, tokens.shape[1]).flatten(1).T + encoding[i] for i, size in enumerate(sizes)]
    )
    layers = {key.split(".")[4] for key in state if key.startswith(f"{name}.encoder.layers.")}
    for layer in range(len(layers)):
        block = f"{name}.encoder.layers.{layer}"
        y = deformable(state, f"{block}.attentions.0", tokens, places, sizes)
        tokens = norm(state, f"{block}.norms.0", tokens + y)
        y = linear(
            state, f"{block}.ffns.0.layers.1", relu(linear(state, f"{block}.ffns.0.layers.0.0", tokens))
        )
        tokens = norm(state, f"{block}.norms.1", tokens + y)
    pieces = tokens.split([h * w for h, w in sizes])
    levels = [piece.T.reshape(-1, *size) for piece, size in zip(pieces, sizes)]
    fine = convolved(state, f"{name}.lateral_convs.0", features[0], False)
    fine = fine + interpolate(levels[-1][None], fine.shape[1:], mode="bilinear")[0]
    fine = relu(convolved(state, f"{name}.output_convs.0", fine, False))
    weight, bias = (state[f"{name}.mask_feature.{kind}"].double() for kind in ("weight", "bias"))
    return conv2d(fine[None], weight, bias)[0], levels


def deformable(state: State, name: str, tokens: Tensor, places: Tensor, sizes: list[torch.Size]) -> Tensor:
    """Each token samples each level at a few points around its own place."""
    asked = tokens + places
    value = linear(state, f"{name}.value_proj", tokens)
    shape = (-1, HEADS, LEVELS, POINTS)
    offsets = linear(state, f"{name}.sampling_offsets", asked).view(*shape, 2)
    weights = linear(state, f"{name}.attention_weights", asked).view(-1, HEADS, LEVELS * POINTS).softmax(-1)
    weights = weights.view(shape)
    own = torch.cat(
        [
            torch.stack([(columns + 0.5) / w, (rows + 0.5) / h], -1).view(-1, 2)
            for h, w in sizes
            for rows, columns in [torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")]
        ]
    ).double()
    out = torch.zeros(len(tokens), HEADS, value.shape[1] // HEADS, dtype=torch.float64)
    for level, (piece, (h, w)) in enumerate(zip(value.split([h * w for h, w in sizes]), sizes)):
        for head in range(HEADS):
            grid = piece.view(h, w, HEADS, -1)[:, :, head].permute(2, 0, 1)[None]
            at = own[:, None] + offsets[:, head, level] / torch.tensor([w, h])
            sampled = grid_sample(grid, 2 * at[None] - 1, align_corners=False)[0]  # [C, T, P]
            out[:, head] += (sampled * weights[:, head, level]).sum(-1).T
    return linear(state, f"{name}.output_proj", out.flatten(1))


def queries(state: State, mask_feature: Tensor, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
    head = "panoptic_head"
    x = state[f"{head}.query_feat.weight"].double()
    place = state[f"{head}.query_embed.weight"].double()
    memory = [
        level.flatten(1).T + state[f"{head}.level_embed.weight"][i].double() for i, level in enumerate(levels)
    ]
    keys = [positions(*level.shape[1:], x.shape[1]).flatten(1).T for level in levels]

    def predict(size: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        y = norm(state, f"{head}.transformer_decoder.post_norm", x)
        embedded = relu(linear(state, f"{head}.mask_embed.2", relu(linear(state, f"{head}.mask_embed.0", y))))
        masks = torch.einsum("qc,chw->qhw", linear(state, f"{head}.mask_embed.4", embedded), mask_feature)
        outside = interpolate(masks[None], size, mode="bilinear")[0].flatten(1).sigmoid() < 0.5
        outside[outside.all(1)] = False
        return linear(state, f"{head}.cls_embed", y), masks, torch.where(outside, -math.inf, 0.0)

    classes, masks, hidden = predict(levels[0].shape[1:])
    layers = {key.split(".")[3] for key in state if key.startswith(f"{head}.transformer_decoder.layers.")}
    for layer in range(len(layers)):
        block = f"{head}.transformer_decoder.layers.{layer}"
        level = layer % LEVELS
        for attention in (0, 1):
            name = f"{block}.attentions.{attention}.attn"
            read = (memory[level] + keys[level], memory[level]) if attention == 0 else (x + place, x)
            weights = state[f"{name}.in_proj_weight"].double().chunk(3)
            biases = state[f"{name}.in_proj_bias"].double().chunk(3)
            q, k, v = (y @ w.T + b for y, w, b in zip((x + place, *read), weights, biases))
            y = attend(q, k, v, HEADS, hidden if attention == 0 else None)
            x = norm(state, f"{block}.norms.{attention}", x + linear(state, f"{name}.out_proj", y))
        y = linear(state, f"{block}.ffns.0.layers.1", relu(linear(state, f"{block}.ffns.0.layers.0.0", x)))
        x = norm(state, f"{block}.norms.2", x + y)
        classes, masks, hidden = predict(levels[(layer + 1) % LEVELS].shape[1:])
    return classes, masks
