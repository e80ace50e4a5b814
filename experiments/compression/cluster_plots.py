"""Pictures of what clustering does to a text: `python -m experiments.compression.cluster_plots FOLDER ...`.

Four panels in one PNG: ratio per layer, threshold per token, histogram of best similarities, and a 2-D map of
the states coloured by cluster (the first two principal components).

Shape legend: T time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from model.compress import clustering as ops
from model.compress import load_compressor, load_decoder, load_tokenizer, wrap
from model.compress.cluster_layer import Clustered, ClusterLayer
from model.compress.clusters import Clusters


@torch.no_grad()
def measure(c: Clusters, ids: torch.Tensor) -> list[dict[str, Any]]:
    """What each clustered layer makes of a row [1, T] while it is compressed: layer, ratio (T over its
    representatives), and over the T' tokens that reach it tau [T'], best [T'-1], member [T'], map [T', 2]."""
    seen: list[tuple[ClusterLayer, tuple[Any, ...], Clustered]] = []
    hooks = [x.register_forward_hook(lambda *call: seen.append(call)) for x in c.layers.values()]
    try:
        c.compress(ids)
    finally:
        for hook in hooks:
            hook.remove()
    out = []
    for i, (layer, (h, mask, _, attention, _), made) in zip(c.config.layer_idx, seen):
        h = h.to(layer.tau.dtype)
        s = ops.similarity(h, attention, c.config.attention_weight, c.config.position_reach)
        earlier = torch.ones_like(s[0], dtype=torch.bool).tril(-1)
        centred = h[0] - h[0].mean(0)
        out.append(
            {
                "layer": i,
                "ratio": ids.shape[1] / int(made.shown.sum()),
                "tau": layer.thresholds(h, s, mask)[0],
                "best": s[0].masked_fill(~earlier, -1).amax(-1)[1:],
                "member": made.member[0],
                "map": centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T,
            }
        )
    return out


def draw(found: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 8))
    axes[0, 0].bar([str(f["layer"]) for f in found], [f["ratio"] for f in found])
    axes[0, 0].set(xlabel="layer", ylabel="tokens per representative")
    for f in found:
        axes[0, 1].plot(f["tau"], label=f"layer {f['layer']}")
        axes[1, 0].hist(f["best"].numpy(), bins=40, alpha=0.6, label=f"layer {f['layer']}")
    axes[0, 1].set(xlabel="token", ylabel="threshold")
    axes[1, 0].set(xlabel="similarity to the closest earlier token", ylabel="tokens")
    last = found[-1]
    axes[1, 1].scatter(last["map"][:, 0], last["map"][:, 1], c=last["member"], cmap="tab20", s=12)
    axes[1, 1].set(xlabel="first component", ylabel=f"second component, layer {last['layer']}")
    axes[0, 1].legend()
    axes[1, 0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("compressor", nargs="?", type=Path, help="a saved clusters compressor; none: post hoc")
    p.add_argument("--decoder", default="smollm2-135m-instruct")
    p.add_argument("--text", type=Path, required=True, help="a text file")
    p.add_argument("--tokens", type=int, default=256)
    p.add_argument("--compression_layers", type=int, default=3)
    p.add_argument("--similarity_threshold", type=float, default=0.85)
    p.add_argument("--out", type=Path, default=Path("clusters.png"))
    args = p.parse_args(argv)
    model, tokenizer = load_decoder(args.decoder), load_tokenizer(args.decoder)
    if args.compressor is None:
        c = wrap(
            model, "clusters", importance=False, contrastive_weight=0.0,
            compression_layers=args.compression_layers, similarity_threshold=args.similarity_threshold,
        )  # fmt: skip
    else:
        c = load_compressor(args.compressor, model)
    if not isinstance(c, Clusters):
        p.error(f"{args.compressor} holds a {c.registered_name}, not clusters")
    ids = torch.tensor([tokenizer.encode(args.text.read_text())[: args.tokens]])
    found = measure(c, ids)
    draw(found, args.out)
    for f in found:
        print(f"layer {f['layer']}: {f['ratio']:.2f} tokens per representative")
    return 0


if __name__ == "__main__":
    sys.exit(main())
