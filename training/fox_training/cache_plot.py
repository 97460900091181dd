"""Draw what an evicting cache held over a long sequence, from its reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from modeling_fox import CacheReport


def plot_cache(reports: Sequence[CacheReport], path: str | Path, process_bytes: Sequence[int] | None = None) -> None:
    """Write a picture of two panels over the tokens read: memory, and live keys of the heads.

    Args:
        reports: What `FoxEvictingCache.report()` gave from time to time.
        path: Of the picture; its ending says the format.
        process_bytes: Memory of the process at each report. Default: None, not drawn.

    Raises:
        ValueError: If there are no reports, or not as many numbers as reports.
    """
    if not reports or (process_bytes is not None and len(process_bytes) != len(reports)):
        numbers = None if process_bytes is None else len(process_bytes)
        raise ValueError(
            f"`reports` must hold at least one report, and `process_bytes` as many numbers; got {len(reports)} and "
            f"{numbers}. Collect both at the same tokens."
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokens = [report.num_tokens for report in reports]
    figure, (memory, live) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    memory.plot(tokens, [x.memory_bytes / 2**20 for x in reports], label="cache")
    if process_bytes is not None:
        memory.plot(tokens, [x / 2**20 for x in process_bytes], label="process, peak")
    per_key = next((x.memory_bytes / max(int(x.live_keys.sum()), 1) for x in reports if x.num_tokens), 0.0)
    memory.plot(tokens, [x.full_keys * per_key / 2**20 for x in reports], linestyle="--", label="cache of everything")
    memory.set(ylabel="MiB", yscale="log")
    memory.legend()
    for name, choose in (("longest head", "amax"), ("mean", "mean"), ("shortest head", "amin")):
        live.plot(tokens, [float(getattr(x.live_keys.float(), choose)()) for x in reports], label=name)
    worst = max(x.lost_mass_bound for x in reports)
    live.set(xlabel="tokens", ylabel="live keys of a head", title=f"at most {worst:.1e} of any row of attention lost")
    live.legend()
    figure.savefig(path)
    pyplot.close(figure)
