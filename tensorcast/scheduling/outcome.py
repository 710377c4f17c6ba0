"""What a replay found: times of every request, their percentiles, goodput, why requests broke a limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.cost.evidence import NORMAL_80, NORMAL_90
from tensorcast.scheduling.record import GAPS_S, Record
from tensorcast.serving.traffic import Array

if TYPE_CHECKING:
    import pandas as pd

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)

LIMIT_NAMES = {"ttft_s": "TTFT", "tpot_s": "TPOT", "request_s": "E2E"}
"""Limits as they are written."""

CAUSES = ("queue", "own prompt", "others' prompts", "decoding", "started over")
"""What a request's time goes into."""

MAY_CAUSE = {
    "ttft_s": ("queue", "own prompt"), "tpot_s": ("others' prompts", "decoding", "started over"), "request_s": CAUSES,
}
"""Parts of a request's time that a limit is about."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The longest time to first token, per output token and of a request that users accept; none where not said."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    request_s: float | None = None

    def kept(self, times: Mapping[str, Array]) -> Array:
        """Whether each request keeps them all; one that never ended keeps none."""
        found: Array = np.isfinite(times["request_s"])
        for name, limit in vars(self).items():
            if limit is not None:
                found = found & (times[name] <= limit)
        return found


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Of one replay. ``servers``: busy share, steps and moments of each; ``gpus``: in all, on average over the replay;
    ``refused``: requests longer than any cache; ``stopped``: it was ended before the last request. ``draws``: summaries
    under other step times, from which the bands are. ``usd_per_gpu_hour``: 0 where cost is not asked for.
    """

    record: Record
    layout: str
    gpus: float
    limits: Limits
    refused: int
    servers: tuple[dict[str, Any], ...]
    stopped: bool = False
    usd_per_gpu_hour: float = 0.0
    notes: tuple[str, ...] = ()
    draws: tuple[dict[str, float], ...] = field(default=(), repr=False)

    @cached_property
    def times(self) -> dict[str, Array]:
        """``ttft_s, tpot_s, request_s`` of every request ``[N]``; NaN of a refused one. A reply of one token has a time
        per token of 0."""
        record, replies = self.record, self.record.requests.output_len
        ttft = record.first_s - record.sent_s
        tpot = (record.last_s - record.first_s) / np.maximum(replies - 1, 1)
        return {"ttft_s": ttft, "tpot_s": tpot, "request_s": record.last_s - record.sent_s}

    @cached_property
    def seconds(self) -> float:
        """From the first request sent to the last token."""
        return float(np.nanmax(self.record.last_s) - np.nanmin(self.record.sent_s)) if self.served else np.nan

    @property
    def served(self) -> int:
        return int(np.isfinite(self.record.last_s).sum())

    @property
    def unserved(self) -> int:
        """Requests that were neither served nor refused: no server was left, or the replay was stopped."""
        return len(self.record.requests) - self.served - self.refused

    @property
    def within_limits(self) -> float:
        """Share of the requests that keep the limits."""
        return float(self.limits.kept(self.times).mean())

    def means(self) -> dict[str, float]:
        """Of the requests that were served: their mean times and their rates, by name with unit."""
        done = np.isfinite(self.record.last_s)
        found = {f"{name[:-2]}_mean_s": float(values[done].mean()) for name, values in self.times.items()}
        found["output_tokens_per_s"] = float(self.record.requests.output_len[done].sum()) / self.seconds
        return found | {"requests_per_s": self.served / self.seconds}

    def summary(self) -> dict[str, float]:
        """Means, percentiles and rates, by name with unit."""
        found: dict[str, float] = {
            "requests": float(len(self.record.requests)), "served": float(self.served), "refused": float(self.refused),
            "unserved": float(self.unserved), "duration_s": self.seconds,
        }
        if np.isfinite(self.record.requests.rate) and self.record.requests.users is None:
            found["sent_per_s"] = self.record.requests.rate
        done = np.isfinite(self.record.last_s)
        if done.any():
            means = self.means()
            for name, values in self.times.items():
                kept = values[done]
                found[f"{name[:-2]}_mean_s"] = means[f"{name[:-2]}_mean_s"]
                for p, value in zip(PERCENTILES, np.percentile(kept, PERCENTILES), strict=True):
                    found[f"{name[:-2]}_p{p:g}_s"] = float(value)
            for p in PERCENTILES:
                found[f"itl_p{p:g}_s"] = self._gap(p)
            requests = self.record.requests
            found["output_tokens_per_s"] = means["output_tokens_per_s"]
            found["input_tokens_per_s"] = float(requests.input_len[done].sum()) / self.seconds
            found["requests_per_s"] = means["requests_per_s"]
            found["output_tokens_per_s_per_gpu"] = found["output_tokens_per_s"] / self.gpus
            found["within_limits"] = self.within_limits
            found["goodput_requests_per_s"] = self.within_limits * len(requests) / self.seconds
            found["goodput_requests_per_s_per_gpu"] = found["goodput_requests_per_s"] / self.gpus
            if self.usd_per_gpu_hour:
                usd_per_s = self.gpus * self.usd_per_gpu_hour / 3600
                found["usd_per_million_output_tokens"] = 1e6 * usd_per_s / found["output_tokens_per_s"]
                found["goodput_requests_per_usd"] = found["goodput_requests_per_s"] / usd_per_s
            found["cache_hit_share"] = float(self.record.cached_tokens.sum() / requests.input_len.sum())
        found["preemptions"] = float(self.record.preemptions.sum())
        found["moved"] = float(self.record.moved.sum())
        found["busy_share"] = float(np.mean([one["busy_share"] for one in self.servers]))
        return found

    def bands(self) -> dict[str, tuple[float, float]]:
        """80 % bands of every number of :meth:`summary` that is a time or a rate, from the spread of ``draws``."""
        if len(self.draws) < 2:
            return {}
        own = self.summary()
        found = {}
        for name, value in own.items():
            drawn = np.array([draw.get(name, np.nan) for draw in self.draws])
            varies = name.endswith(("_s", "_per_gpu")) and name not in ("duration_s", "sent_per_s")
            if varies and value > 0 and np.all(drawn > 0):
                factor = float(np.exp(NORMAL_90 * np.sqrt(np.mean(np.log(drawn / value) ** 2))))
                found[name] = value / factor, value * factor
        return found

    def causes(self) -> pd.DataFrame:
        """Seconds of requests by :data:`CAUSES`, means: of all, and of those beyond each limit."""
        import pandas as pd

        parts = self._parts()
        rows = {"all": np.isfinite(self.record.last_s)}
        for name, limit in vars(self.limits).items():
            if limit is not None:
                rows[f"{LIMIT_NAMES[name]} over"] = self.times[name] > limit
        records = [
            {"requests": int(chosen.sum()), **{cause: float(parts[cause][chosen].mean()) for cause in CAUSES}}
            for chosen in rows.values()
            if chosen.any()
        ]
        return pd.DataFrame(records, index=[name for name, chosen in rows.items() if chosen.any()])

    def broken(self) -> pd.DataFrame:
        """A row per request and limit that it broke, the worst first: the time, and ``because``, that part of
        :data:`CAUSES` which is furthest above what it takes in the middle request of those that keep the limit."""
        import pandas as pd

        parts, requests, frames = self._parts(), self.record.requests, []
        done = np.isfinite(self.record.last_s)
        for name, limit in vars(self.limits).items():
            if limit is None:
                continue
            kept, over = done & (self.times[name] <= limit), np.flatnonzero(done & (self.times[name] > limit))
            own = np.array([parts[cause] for cause in MAY_CAUSE[name]])
            usual = np.median(own[:, kept], axis=1) if kept.any() else np.zeros(len(own))
            worst = np.argmax(np.where(own > 0, own - usual[:, None], -np.inf)[:, over], axis=0)
            frames.append(pd.DataFrame({
                "request": over, "limit": name[:-2], "seconds": self.times[name][over], "limit_s": limit,
                "because": np.array(MAY_CAUSE[name])[worst], "of_it_s": own[worst, over],
                "sent_s": self.record.sent_s[over], "input_len": requests.input_len[over],
                "output_len": requests.output_len[over],
            }))  # fmt: skip
        if not frames:
            return pd.DataFrame({"request": [], "limit": [], "seconds": [], "limit_s": [], "because": []})
        found = pd.concat(frames, ignore_index=True)
        order = (found["seconds"] / found["limit_s"]).sort_values(ascending=False, kind="stable").index
        return found.loc[order].reset_index(drop=True)

    def per_request(self) -> pd.DataFrame:
        """A row per request: when it came, its lengths, its times, what they went into, where it ran."""
        import pandas as pd

        record, requests = self.record, self.record.requests
        return pd.DataFrame({
            "sent_s": record.sent_s, "input_len": requests.input_len, "output_len": requests.output_len, **self.times,
            "cached_tokens": record.cached_tokens.astype(int), "preemptions": record.preemptions,
            "moved": record.moved, "server": record.server, "within_limits": self.limits.kept(self.times),
            **{f"{name.replace(' ', '_').replace(chr(39), '')}_s": values for name, values in self._parts().items()},
        })  # fmt: skip

    def _parts(self) -> dict[str, Array]:
        record = self.record
        again = record.again()
        queue = record.admitted_s - record.sent_s
        own = record.first_s - record.admitted_s
        writing = record.last_s - record.first_s
        others = np.minimum(record.others_s, writing)
        rest = writing - others
        return {
            "queue": queue, "own prompt": own, "others' prompts": np.where(again, 0.0, others),
            "decoding": np.where(again, 0.0, rest), "started over": np.where(again, writing, 0.0),
        }

    def _gap(self, percentile: float) -> float:
        """A percentile of the gaps between tokens, to 1 %."""
        below = np.cumsum(self.record.gaps)
        if not below[-1]:
            return 0.0
        return float(GAPS_S[min(int(np.searchsorted(below, below[-1] * percentile / 100)), len(GAPS_S) - 1)])


def drawn_factors(error: float, draws: int, random: np.random.Generator) -> Array:
    """Factors of step times that are off by ``error`` in the median, log-normal."""
    found: Array = np.exp(random.normal(0.0, np.log1p(NORMAL_80 * error) / NORMAL_90, draws))
    return found
