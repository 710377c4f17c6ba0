"""How far predictions of a table are from its measured columns, and whether they would have picked the right layout."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from tensorcast.errors import InputError
from tensorcast.predict.predict import PREDICTED, bound
from tensorcast.predict.run_columns import COLUMNS, MODES, canonical_columns
from tensorcast.serving.objective import OBJECTIVES, Objective

if TYPE_CHECKING:
    import pandas as pd

BY = ("mode", "model", "device", "engine", "layout")
"""Columns that errors are summed up by."""

PICKED_FOR = {
    one.column: one for one in (Objective("tpot", "tpot_s", True, "s per output token"), OBJECTIVES["tokens_per_gpu"])
}
"""What a layout is picked for, by column: the fastest tokens for a user, the most tokens per GPU."""


def summarise(table: pd.DataFrame) -> dict[str, Any]:
    """Errors of a predicted table: in all, on rows left out of all fits (:func:`left_out`), by every column of
    :data:`BY`, and of picking layouts. Plain values.

    ``table``: what :func:`tensorcast.predict.predict.predict` returns. Sections whose columns were not measured are
    left out; rows that could not be predicted count in ``rows`` and ``predicted``.
    """
    frame = named(table)
    summary: dict[str, Any] = {
        "rows": len(frame),
        "predicted": int((frame["problem"] == "").sum()),
        "routing": sorted({str(COLUMNS["routing"][1])} if "routing" not in frame else {
            str(law) or str(COLUMNS["routing"][1]) for law in frame["routing"].fillna("")
        }),
        "problems": {str(k): int(v) for k, v in frame["problem"][frame["problem"] != ""].value_counts().items()},
        "errors": {name: errors(frame, name) for name in PREDICTED if f"measured_{name}" in frame},
    }
    fresh = left_out(frame)
    # empty where no row was fitted to: then all were left out
    summary["left_out"] = {} if fresh.all() else {name: errors(frame[fresh], name) for name in summary["errors"]}
    if not summary["errors"]:
        return summary
    summary["by"] = {
        column: {
            str(key): {name: errors(rows, name) for name in summary["errors"]}
            for key, rows in frame.groupby(column, dropna=False)
        }
        for column in BY
        if column in frame
    }
    summary["layouts"] = {name: choice(frame, name) for name in PICKED_FOR if f"measured_{name}" in frame}
    if "measured_tpot_s" in frame and "gpus" in frame:
        summary["layouts"]["tpot_s_same_gpus"] = choice(frame, "tpot_s", same_gpus=True)
    return summary


def named(table: pd.DataFrame) -> pd.DataFrame:
    """``table`` under our column names, profiles by one name each, measured throughput filled in where it follows.

    A closed loop of ``n`` requests hands out ``n * osl`` tokens per request time, first token and the others.
    """
    import pandas as pd

    frame = table.rename(columns=canonical_columns(table))
    for name in ("model", "device", "engine", "mode"):
        text = frame[name].astype(str).str.strip() if name in frame else pd.Series("", index=frame.index)
        frame[name] = text.replace("", COLUMNS[name][1] or "")
    frame["mode"] = frame["mode"].str.lower().replace(MODES)
    for name in [str(name) for name in frame if str(name).startswith("measured_")]:
        number = _number(frame, name)
        frame[name] = number.where((number > 0) & (number < float("inf")))  # what is no time or rate was not measured
    for kind in ("", "measured_"):
        tokens = f"{kind}output_tokens_per_s"
        if tokens not in frame and {"measured_ttft_s", "measured_tpot_s", "isl", "osl", "concurrency"} <= set(frame):
            osl, users = (_number(frame, name) for name in ("osl", "concurrency"))
            frame[tokens] = users * osl / (frame["measured_ttft_s"] + (osl - 1) * frame["measured_tpot_s"])
        if tokens in frame:
            frame[f"{kind}tokens_per_s_per_gpu"] = _number(frame, tokens) / _number(frame, "gpus")
    return frame


def _number(frame: pd.DataFrame, name: str) -> pd.Series[Any]:
    import pandas as pd

    return pd.to_numeric(frame[name], errors="coerce")


def errors(frame: pd.DataFrame, name: str) -> dict[str, Any]:
    """Errors of the predicted column ``name``: |predicted / measured - 1| over rows that have both.

    ``ratio``: median of predicted / measured. ``inside``: share of rows whose measured value lies in the interval.
    """
    predicted, measured = _number(frame, name), _number(frame, f"measured_{name}")
    both = (predicted > 0) & (measured > 0)
    predicted, measured = predicted[both], measured[both]
    if not both.any():
        return {"rows": 0}
    off = (predicted / measured - 1).abs()
    found = {
        "rows": int(both.sum()),
        "median": float(off.median()),
        "mean": float(off.mean()),
        "within_10": float((off <= 0.1).mean()),
        "within_20": float((off <= 0.2).mean()),
        "ratio": float((predicted / measured).median()),
    }
    if bound(name, "low") in frame:
        low, high = _number(frame, bound(name, "low"))[both], _number(frame, bound(name, "high"))[both]
        found["inside"] = float(((measured >= low) & (measured <= high)).mean())
    return found


def choice(frame: pd.DataFrame, objective: str, same_gpus: bool = False) -> dict[str, Any]:
    """Picking the best layout by prediction, within groups of rows that differ in nothing but their layout.

    ``same_gpus``: layouts of as many GPUs only, where more of them cannot be the answer.

    Repeated rows of a layout count once, at their median. ``best``: share of groups whose measured best is picked;
    ``regret``: how much worse the picked layout measured than the best (mean, and mean over groups where the pick was
    wrong); ``rank_correlation``: Spearman's, mean over groups of three layouts and more; ``pairs``: share of pairs of
    layouts in the right order, pairs that measured within 3 % of each other (what repeating moves) left out.
    """
    sign = 1.0 if PICKED_FOR[objective].less else -1.0
    measured, regrets, ranks = f"measured_{objective}", [], []
    right = pairs = 0
    for _, rows in _alike(frame, same_gpus, objective, measured):
        both = rows.groupby("layout")[[objective, measured]].median()
        if len(both) < 2:
            continue
        value, truth = sign * both[objective].to_numpy(), sign * both[measured].to_numpy()
        picked, best = truth[value.argmin()], truth.min()
        regrets.append(abs(picked - best) / abs(best))
        if len(both) >= 3 and both.nunique().min() > 1:
            ranks.append(float(both.rank().corr().iloc[0, 1]))  # Spearman's
        first, second = np.triu_indices(len(both), 1)
        apart = np.abs(truth[first] / truth[second] - 1) > 0.03
        same = (value[first] < value[second]) == (truth[first] < truth[second])
        right, pairs = right + int((same & apart).sum()), pairs + int(apart.sum())
    if not regrets:
        return {"groups": 0}
    wrong = [r for r in regrets if r > 0]
    return {
        "groups": len(regrets),
        "best": 1 - len(wrong) / len(regrets),
        "regret": float(np.mean(regrets)),
        "regret_where_wrong": float(np.mean(wrong)) if wrong else 0.0,
        "rank_correlation": float(np.mean(ranks)) if ranks else None,
        "pairs": right / pairs if pairs else None,
    }


def _alike(frame: pd.DataFrame, same_gpus: bool, *needed: str) -> Any:
    """Groups of predicted rows that agree in all of our columns but layouts, and in the engine's version if named."""
    import pandas as pd

    rows = frame[frame[list(needed)].apply(pd.to_numeric, errors="coerce").gt(0).all(axis=1)]
    fixed = [name for name in COLUMNS if name in rows and name != "replicas"]
    fixed += [name for name in rows.columns if str(name).lower() in ("backend_version", "engine_version")]
    fixed += ["gpus"] if same_gpus else []
    return rows.groupby(fixed, dropna=False, sort=True)


def fitted_half(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows of the half that constants are fitted to: by a hash of model, device, layout and lengths as written."""
    import pandas as pd

    keys = frame.reindex(columns=["model", "device", "layout", "isl", "osl"]).astype(object)
    texts = ["|".join(map(str, key)) for key in keys.itertuples(index=False)]
    even = [hashlib.sha256(text.encode()).digest()[0] % 2 == 0 for text in texts]
    return pd.Series(even, index=frame.index)


def left_out(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows of a table that no engine's overheads were fitted to.

    Fitted to are rows of :func:`fitted_half` of the models, devices and engines that the engine profiles name, and
    what was measured the same to the last digit: records of one run under two names.
    """
    import pandas as pd

    known = {key: _fitted_models(*key) for key in set(zip(frame["engine"], frame["device"], strict=True))}
    keys = zip(frame["engine"], frame["device"], frame["model"], strict=True)
    named_there = pd.Series([model in known[engine, device] for engine, device, model in keys], index=frame.index)
    used = fitted_half(frame) & named_there
    return ~(used | used.groupby(same_run(frame)).transform("any"))


def same_run(frame: pd.DataFrame) -> pd.Series[Any]:
    """A number per measured run: rows of one engine and device with the same measured times have the same."""
    columns = ["engine", "device", *(name for name in ("measured_ttft_s", "measured_tpot_s") if name in frame)]
    return frame.groupby(columns, dropna=False).ngroup()


def _fitted_models(engine: str, device: str) -> frozenset[str]:
    """Models whose runs on ``device`` the overheads of ``engine`` were fitted to; names as tables have them."""
    from tensorcast.profiles.store import load_device, load_engine

    try:
        fit = load_engine(engine).fitted
        here = fit.served.get(load_device(device.replace("_", "-")).name, ()) if fit else ()
    except InputError:  # such rows cannot be predicted, and could not be fitted to
        return frozenset()
    return frozenset(here)
