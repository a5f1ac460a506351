"""docs/tutorial.md, own-method.md and migrate.md: every block of code on them is run, on small data."""

from __future__ import annotations

import copy
import glob
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import d2net
from d2net.cli import app
from d2net.data import Times, open_dataset
from d2net.data.watch import load_watch
from d2net.detections import Detections, read_detections
from d2net.errors import InputError
from d2net.evaluation import evaluate
from d2net.losses import D2NetLoss
from d2net.ops import extract_proposals, nms_1d

DOCS = Path(__file__).parents[1] / "docs"

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(heading, language, code) of every block of code of a page, in order."""
    heading, text = "", (DOCS / page).read_text(encoding="utf-8")
    for found in re.finditer(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if found[1] is None:
            yield heading, found[2], found[3]
        else:
            heading = found[1]


def run(line: str) -> str:
    """A command as a shell runs it, with patterns of files; what it prints."""
    words = [w for word in shlex.split(line)[1:] for w in (sorted(glob.glob(word)) if "*" in word else [word])]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120", "D2NET_DEBUG": None})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{line}\n{result.output}"
    return result.output


def execute(page: str, code: str, names: dict[str, Any]) -> None:
    exec(compile(code, f"docs/{page}", "exec"), names)


def test_tutorial(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recordings = load_watch()  # takes seconds, and three commands of the page do it
    for place in ("d2net.data.watch", "d2net.demo"):
        monkeypatch.setattr(f"{place}.load_watch", lambda **_: recordings)
    names: dict[str, Any] = {}
    printed = {}
    for _, language, code in blocks("tutorial.md"):
        if language == "python":
            execute("tutorial.md", code, names)
        elif language == "sh":
            for line in code.splitlines():
                shorter = line.replace("d2net demo", "d2net demo --iterations 20").replace("=600 ", "=20 ")
                printed[line] = run(shorter)
        else:  # the first lines of a file that a command before it has written
            assert language == "csv"
            written = Path("runs/demo/found.csv").read_text().splitlines()
            assert code.splitlines()[0] == written[0] and written[1].startswith("watch_test_")
    assert "0.6667" in capsys.readouterr().out
    page = re.sub(r"\s+", " ", (DOCS / "tutorial.md").read_text(encoding="utf-8"))
    assert printed["d2net inspect my-data"].rstrip().endswith("nothing suspicious") and '"nothing suspicious"' in page
    (evaluated,) = (text for line, text in printed.items() if line.endswith("detections.json --annotations my-data"))
    table = [float(x) for x in re.findall(r"\d+\.\d", evaluated[evaluated.index("│") : evaluated.index("└")])]
    assert table[4] >= 90 and table[6] < table[4]  # mAP@0.5 and 0.7, as the page says of them
    assert re.search(r"judged: \d+ detections against 12 recordings", evaluated)
    assert Path("runs/mine/report.html").stat().st_size > 100_000 and Path("timeline.png").stat().st_size > 10_000
    assert read_detections("found/detections.csv").videos == ("wrist-36",)


def test_own_method(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    averages = {}
    for heading, language, code in blocks("own-method.md"):
        if heading == "PyTorch Lightning":
            continue  # the next test
        if language == "sh":
            for line in code.splitlines():
                run(line)
        else:
            assert language == "python"
            execute("own-method.md", code, names)
        if heading == "Evaluate, write, report" and language == "python":
            averages["own network"] = names["result"].average
    assert averages["own network"] > 60  # it has learned
    assert names["model"].x_ref.any() and len(names["fewer"]) < len(names["detections"]) and len(names["plain"])
    assert names["own"].videos == names["detections"].videos
    assert {p.name for p in Path().glob("*.*")} >= {"mine.json", "mine.html", "mine.png", "own.json"}
    assert torch.equal(d2net.load_model("runs/own").x_ref, names["network"].x_ref)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in names["model"].parameters())


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    wanted = ("Change the method", "Your own network", "Evaluate, write, report", "PyTorch Lightning")
    for heading, language, code in blocks("own-method.md"):
        if heading in wanted and language == "python":
            if heading == "Evaluate, write, report":  # its imports
                code = "\n".join(line for line in code.splitlines() if line.startswith("from "))
            execute("own-method.md", code, names)
    lit = names["trainer"].lightning_module
    assert lit.loss.reference is lit.network.x_ref and lit.network.x_ref.any()
    found = names["localize"](names["network"], names["test"], names["recipe"].localization)
    assert names["evaluate"](found, names["test"].annotations()).average > 60


# --- docs/migrate.md: each case runs the lines of both sides, theirs ("-") and ours ("+"), and compares ---------------


def their_nms(segs, scores, iou_threshold):
    """ActionFormer's greedy NMS: 1e-6 is added to every length."""
    lengths, keep = segs[:, 1] - segs[:, 0] + 1e-6, []
    for i in scores.argsort(descending=True).tolist():
        inter = (torch.minimum(segs[i, 1], segs[keep, 1]) - torch.maximum(segs[i, 0], segs[keep, 0])).clamp(min=0)
        if not (inter / (lengths[i] + lengths[keep] - inter) >= iou_threshold).any():
            keep.append(i)
    return torch.tensor(keep, dtype=torch.int64)


def their_soft_nms(segs, scores, dets, iou_threshold, sigma, min_score, method):
    """ActionFormer's soft-NMS: writes rows (start, end, score) into ``dets``."""
    left, scores, lengths, keep = list(range(len(segs))), scores.clone(), segs[:, 1] - segs[:, 0] + 1e-6, []
    while left:
        best = left.pop(int(scores[left].argmax()))
        dets[len(keep)] = torch.stack((*segs[best], scores[best]))
        keep.append(best)
        low, high = torch.maximum(segs[best, 0], segs[left, 0]), torch.minimum(segs[best, 1], segs[left, 1])
        inter = (high - low).clamp(min=0)
        iou = inter / (lengths[best] + lengths[left] - inter)
        weight = torch.exp(-iou * iou / sigma) if method == 2 else torch.where(iou >= iou_threshold, 1 - iou, 1)
        scores[left] *= weight
        left = [i for i in left if scores[i] >= min_score]
    return torch.tensor(keep)


def their_batched_nms(segs, scores, labels, iou, min_score, most, use_soft_nms, multiclass, sigma, voting_thresh):
    assert multiclass and not use_soft_nms
    rows = torch.nonzero(scores > min_score).flatten()
    keep = [of[their_nms(segs[of], scores[of], iou)] for c in labels.unique() for of in [rows[labels[rows] == c]]]
    keep = torch.cat([of[:most] for of in keep])
    keep = keep[scores[keep].argsort(descending=True)][:most]
    return segs[keep], scores[keep], labels[keep]


def matches(truth, found, level, iou, best_first):
    """Whether each detection of a class, by falling score, takes a ground truth; rows (video, start, end[, score])."""
    free, hits = list(truth), []
    for video, start, end, _ in sorted(found, key=lambda row: -row[3]):
        ious = [(iou(row[1:], (start, end)), row) for row in free if row[0] == video]
        if best_first:
            ious.sort(key=lambda pair: -pair[0])
        taken = next((row for value, row in ious if value >= level), None)
        hits.append(taken is not None)
        if taken is not None:
            free.remove(taken)
    return np.array(hits, bool)


def their_map(truth, found, tiou, *, iou=None, best_first=True, interpolated=True):
    """mAP at each tIoU of rows (video, start, end, label) and (video, start, end, label, score)."""

    def seconds(a, b):
        shared = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        return shared / (a[1] - a[0] + b[1] - b[0] - shared)

    ap = []
    for label in sorted({row[3] for row in truth}):
        gt = [row[:3] for row in truth if row[3] == label]
        of = [(*row[:3], row[4]) for row in found if row[3] == label]
        ap.append([])
        for level in tiou:
            hits = matches(gt, of, level, iou or seconds, best_first)
            precision = hits.cumsum() / np.arange(1, len(hits) + 1)
            if interpolated:
                precision = np.maximum.accumulate(precision[::-1])[::-1]
            ap[-1].append((precision * hits).sum() / len(gt))
    return np.mean(ap, 0)


def annotated(path: str, twice: bool = False) -> list[tuple]:
    """A file of annotations of ten videos (classes Diving 0, Jump 1, Shotput 2; no Jump in "test"); its "test" rows."""
    rng, database, rows = np.random.default_rng(0), {}, []
    for v in range(10):
        subset = "test" if v < 8 else "train"
        starts = np.sort(rng.uniform(0, 100, 6)).round(2)
        of = [
            {
                "segment": [s, s + round(rng.uniform(2, 20), 2)],
                "label": ["Diving", "Shotput"][k % 2],
                "label_id": k % 2 * 2,
            }
            for k, s in enumerate(starts.tolist())
        ]
        rows += [(f"v{v}", *a["segment"], a["label"]) for a in of if subset == "test"]
        of += [{"segment": [1.0, 2.0], "label": "Jump", "label_id": 1}] if subset == "train" else []
        database[f"v{v}"] = {"subset": subset, "duration": 200.0, "annotations": of + (of[:2] if twice else [])}
    Path(path).write_text(json.dumps({"database": database}))
    return rows


def detected(rows: list[tuple], jumps: int = 0) -> list[tuple]:
    """Detections near the annotations and elsewhere, of scores that differ."""
    rng, found = np.random.default_rng(1), []
    for video, start, end, label in rows * 3:
        moved = np.sort(np.array([start, end]) + rng.normal(0, 2, 2)).round(2).tolist()
        found.append((video, *moved, label))
    found += [("v0", 3.0 * k, 3.0 * k + 2, "Jump") for k in range(jumps)]
    scores = rng.permutation(len(found)) / len(found)
    return [(*row, float(score)) for row, score in zip(found, scores, strict=True)]


class Settings(dict):
    """A config of mmengine: its values are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def both(theirs: str, ours: str, imports: dict[str, Any], **given: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    """What the lines of each side leave, from the same values."""
    sides = []
    for code in (theirs, ours):
        names = {**imports, **copy.deepcopy(given)}
        execute("migrate.md", code, names)
        sides.append(SimpleNamespace(**names))
    return sides[0], sides[1]


def segments_and_scores(n: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    start = 200 * torch.rand(n)
    return torch.stack((start, start + 1 + 20 * torch.rand(n)), 1), torch.rand(n)


EXTENSION = SimpleNamespace(nms=their_nms, softnms=their_soft_nms)


def greedy_nms(theirs, ours, imports):
    segs, scores = segments_and_scores()
    a, b = both(theirs, ours, imports, nms_1d_cpu=EXTENSION, segs=segs, scores=scores, iou_threshold=0.4)
    assert torch.equal(a.inds, b.inds) and 10 < len(b.inds) < 200
    edge = {"segs": torch.tensor([[0.0, 2.0], [0.0, 1.0]]), "scores": torch.tensor([0.9, 0.8])}
    a, b = both(theirs, ours, imports, nms_1d_cpu=EXTENSION, **edge, iou_threshold=0.5)
    assert (a.inds.tolist(), b.inds.tolist()) == ([0, 1], [0])
    edge["segs"] = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    a, b = both(theirs, ours, imports, nms_1d_cpu=EXTENSION, **edge, iou_threshold=0.5)
    assert a.inds.tolist() == b.inds.tolist() == [0, 1]


def greedy_nms_of_all_classes(theirs, ours, imports):
    segs, scores = segments_and_scores()
    model = SimpleNamespace(
        test_iou_threshold=0.3,
        test_min_score=0.05,
        test_max_seg_num=40,
        test_nms_method="hard",
        test_multiclass_nms=True,
        test_nms_sigma=0.5,
        test_voting_thresh=0.0,
    )
    given = {"segs": segs, "scores": scores, "labels": torch.arange(300) % 7, "self": model}
    a, b = both(theirs, ours, imports, batched_nms=their_batched_nms, **given)
    assert all(torch.equal(x, y) for x, y in ((a.segs, b.segs), (a.scores, b.scores), (a.labels, b.labels)))
    assert len(b.segs) == 40


def soft_nms(theirs, ours, imports):
    segs, scores = segments_and_scores()
    for method in (1, 2):
        given = {"iou_threshold": 0.1, "sigma": 0.5, "min_score": 0.05, "method": method}
        a, b = both(
            theirs, ours, imports, nms_1d_cpu=EXTENSION, segs=segs, scores=scores, dets=torch.empty(300, 3), **given
        )
        assert torch.equal(a.inds, b.inds) and 10 < len(b.inds) < 300
        torch.testing.assert_close(a.dets[: len(a.inds)], b.dets, atol=1e-5, rtol=0)
        given["min_score"] = 2.0
        a, b = both(
            theirs, ours, imports, nms_1d_cpu=EXTENSION, segs=segs, scores=scores, dets=torch.empty(300, 3), **given
        )
        assert (len(a.inds), len(b.inds)) == (1, 0)


NUMBERS = {"Diving": 0, "Jump": 1, "Shotput": 2}


class ActionFormerEvaluation:
    """Its ANETdetection: drops what stands twice, and renumbers the classes that have ground truth."""

    def __init__(self, json_file, split, tiou_thresholds):
        rows = []
        for name, video in json.loads(Path(json_file).read_text())["database"].items():
            of = [
                (name, *a["segment"], a["label_id"]) for a in video["annotations"] if video["subset"].lower() == split
            ]
            rows += list(dict.fromkeys(of))
        self.index = {label: i for i, label in enumerate(sorted({row[3] for row in rows}))}
        self.truth, self.tiou = [(*row[:3], self.index[row[3]]) for row in rows], tiou_thresholds

    def evaluate(self, results, verbose):
        columns = (results[key] for key in ("video-id", "t-start", "t-end", "label", "score"))
        found = [(v, s, e, self.index.get(c, c), x) for v, s, e, c, x in zip(*columns, strict=True)]
        found_map = their_map(self.truth, found, self.tiou)
        return found_map, found_map.mean(), None


def evaluation_of_actionformer(theirs, ours, imports):
    theirs = theirs.replace("_, mAP, _ =", "evaluator = det_eval\n_, mAP, _ =")  # which it is given as

    def run_both(twice=False, jumps=0):
        rows = detected(annotated("thumos14.json", twice), jumps)
        results = {"video-id": [row[0] for row in rows]}
        results |= {key: np.array([row[i] for row in rows]) for key, i in (("t-start", 1), ("t-end", 2), ("score", 4))}
        results["label"] = np.array([NUMBERS[row[3]] for row in rows])
        val_dataset = SimpleNamespace(json_file="thumos14.json", split=["test"], label_dict=NUMBERS)
        given = {"results": results, "val_dataset": val_dataset, "ANETdetection": ActionFormerEvaluation}
        a, b = both(theirs, ours, imports, **given, val_db_vars={"tiou_thresholds": np.linspace(0.3, 0.7, 5)})
        return a.mAP, b.mAP

    a, b = run_both()
    assert a == pytest.approx(b, abs=1e-12) and 0.1 < b < 0.9
    of_twice = run_both(twice=True)
    assert of_twice[0] == pytest.approx(a, abs=1e-12) and of_twice[1] != pytest.approx(b, abs=1e-4)
    with_jumps = run_both(jumps=60)  # of a class without ground truth here, whose number is now Shotput's
    without = run_both()
    assert with_jumps[0] != pytest.approx(with_jumps[1], abs=1e-4) and without[1] == b


def json_of(rows: list[tuple]) -> dict[str, Any]:
    results: dict[str, list] = {f"v{v}": [] for v in range(8)}
    for video, start, end, label, score in rows:
        results[video].append({"segment": [start, end], "label": label, "score": score})
    return {"results": results}


def evaluation_of_opentad(theirs, ours, imports):
    truth = annotated("anno.json")
    rows = detected(truth)
    Path("result_detection.json").write_text(json.dumps(json_of(rows)))
    cfg = Settings(
        evaluation=Settings(
            type="mAP", subset="test", tiou_thresholds=[0.3, 0.4, 0.5, 0.6, 0.7], ground_truth_filename="anno.json"
        )
    )

    def build_evaluator(settings):
        found = their_map(truth, rows, settings["tiou_thresholds"])
        metrics = {f"mAP@{t}": x for t, x in zip(settings["tiou_thresholds"], found, strict=True)}
        return SimpleNamespace(evaluate=lambda: {"average_mAP": found.mean(), **metrics})

    given = {"cfg": cfg, "result_eval": json_of(rows), "result_path": "result_detection.json"}
    logger = SimpleNamespace(info=lambda text: None)
    a, b = both(theirs, ours, imports, **given, build_evaluator=build_evaluator, logger=logger)
    assert a.metrics_dict == pytest.approx(b.metrics_dict, abs=1e-12) and b.metrics_dict["average_mAP"] > 0.1
    with pytest.raises(InputError):  # a recording that is not listed, and a class
        evaluate(
            replace(b_detections := read_detections("result_detection.json"), videos=(*b_detections.videos[:-1], "w")),
            b.truth,
        )
    with pytest.raises(InputError):
        evaluate(replace(b_detections, classes=("Diving", "Long jump")), b.truth)


def scores_of_classes(theirs, ours, imports):
    model = SimpleNamespace(softmax=torch.nn.Softmax(dim=1), r_easy=5)
    for t in (750, 20):
        cas = torch.rand(2, t, 20, generator=torch.Generator().manual_seed(0))
        a, b = both(theirs, ours, imports, self=model, cas=cas, k_easy=t // 5, lengths=None)
        torch.testing.assert_close(a.video_scores, b.video_scores)
    a, b = both(theirs, ours, imports, self=model, cas=cas[:, :3], k_easy=0, lengths=None)
    assert a.video_scores.isnan().all() and b.video_scores.isfinite().all()


def their_pairs(actionness, embeddings):
    """CoLA's mining without its dropout; and whether every hard region has enough snippets."""
    ndimage = pytest.importorskip("scipy.ndimage")
    easy, hard = actionness.shape[1] // 5, actionness.shape[1] // 20

    def best(value, k):
        order = value.sort(descending=True, dim=1).indices[:, :k]
        return torch.stack([x[i] for x, i in zip(embeddings, order, strict=True)])

    above = (actionness > actionness.quantile(0.5, 1, keepdim=True)).numpy()
    shrunk, grown = (
        [operation(above, structure=np.ones((1, width))) for width in (3, 6)]
        for operation in (ndimage.binary_erosion, ndimage.binary_dilation)
    )
    inner, outer = torch.from_numpy(shrunk[0] & ~shrunk[1]), torch.from_numpy(grown[1] & ~grown[0])
    pairs = {
        "EA": best(actionness, easy),
        "EB": best(-actionness, easy),
        "HA": best(actionness * inner, hard),
        "HB": best(actionness * outer, hard),
    }
    return pairs, bool((inner.sum(1) >= hard).all() and (outer.sum(1) >= hard).all())


def their_contrast(pairs):
    def nce(query, key, negatives):
        query, key, negatives = (F.normalize(x, dim=-1) for x in (query, key, negatives))
        logits = torch.cat(((query * key).sum(1, keepdim=True), (negatives @ query[:, :, None])[:, :, 0]), 1) / 0.07
        return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))

    mean = {name: x.mean(1) for name, x in pairs.items()}
    return nce(mean["HA"], mean["EA"], pairs["EB"]) + nce(mean["HB"], mean["EB"], pairs["EA"])


def snippet_contrast(theirs, ours, imports):
    torch.manual_seed(0)
    wave = torch.sin(torch.arange(200) / 6 + torch.rand(4, 1) * 6)  # regions wide enough for both elements
    actionness, embeddings = 2 + wave + 0.1 * torch.rand(4, 200), torch.randn(4, 200, 16)
    pairs, enough = their_pairs(actionness, embeddings)
    assert enough
    given = {"contrast_pairs": pairs, "embeddings": embeddings, "actionness": actionness, "lengths": None}
    a, b = both(theirs, ours, imports, self=SimpleNamespace(snico_criterion=their_contrast), **given)
    torch.testing.assert_close(a.loss_snico, b.loss_snico, rtol=1e-5, atol=1e-5)


def nms_with_lengths_plus_one(theirs, ours, imports):
    segs, scores = (x.double().numpy() for x in segments_and_scores())
    proposals = np.column_stack((np.full(300, 3.0), scores, segs))
    given = {"proposals": proposals, "x1": segs[:, 0], "x2": segs[:, 1], "scores": scores, "thresh": 0.6}
    a, b = both(theirs, ours, imports, **given)
    assert a.keep == b.keep and 10 < len(b.keep) < 300
    assert len(nms_1d(segs, scores, 0.6)) > len(b.keep)  # without the second, less is removed


def evaluation_of_cola(theirs, ours, imports):
    truth = annotated("gt.json", twice=True)
    rows = detected(truth)
    listed = truth + [row for v in range(8) for row in [r for r in truth if r[0] == f"v{v}"][:2]]  # what stands twice
    Path("result.json").write_text(json.dumps({"method": "[CoLA]", **json_of(rows)}))

    def their_evaluator(gt_path, json_path, subset, tiou_thresholds, verbose, check_status):
        found = their_map(listed, rows, tiou_thresholds)
        return SimpleNamespace(evaluate=lambda: (found, found.mean()))

    cfg = SimpleNamespace(GT_PATH="gt.json", TIOU_THRESH=np.linspace(0.1, 0.7, 7))
    a, b = both(theirs, ours, imports, cfg=cfg, json_path="result.json", ANETdetection=their_evaluator)
    np.testing.assert_allclose(a.mAP, b.mAP, atol=1e-12)
    assert a.average_mAP == pytest.approx(b.average_mAP, abs=1e-12) and b.average_mAP > 0.1


def top_k_pooling(theirs, ours, imports):
    torch.manual_seed(0)
    logits, seq_len = torch.randn(4, 90, 5, requires_grad=True), np.array([90, 41, 8, 1])
    given = {"element_logits": logits, "seq_len": seq_len, "batch_size": 4, "device": "cpu"}
    a, b = both(theirs, ours, imports, **given)
    torch.testing.assert_close(a.instance_logits, b.instance_logits)
    gradients = [
        torch.autograd.grad((x.instance_logits * torch.arange(20.0).view(4, 5)).sum(), x.element_logits)[0]
        for x in (a, b)
    ]
    torch.testing.assert_close(*gradients)


def their_casl(x, logits, seq_len, n_similar, labels, device):
    total, count = 0.0, 0.0
    for i in range(0, 2 * n_similar, 2):
        high, low = [], []
        for k in (i, i + 1):
            of, active = x[k, : seq_len[k]], logits[k, : seq_len[k]].softmax(0)
            high.append(of.T @ active)
            low.append(of.T @ ((1 - active) / max(seq_len[k] - 1, 1)))
        near, far_1, far_2 = (
            1 - F.cosine_similarity(a, b, dim=0) for a, b in ((high[0], high[1]), (high[0], low[1]), (high[1], low[0]))
        )
        common = labels[i] * labels[i + 1]
        total += 0.5 * sum((((near - far + 0.5).clamp(min=0)) * common).sum() for far in (far_1, far_2))
        count += common.sum()
    return total / count


def co_activity_similarity(theirs, ours, imports):
    torch.manual_seed(0)
    labels = torch.eye(5)[[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    labels[:2, 3] = 1  # two classes in common
    given = {"final_features": torch.randn(10, 60, 16), "element_logits": torch.randn(10, 60, 5), "labels": labels}
    given |= {"seq_len": np.array([60, 50, 40, 30, 60, 20, 33, 44, 55, 60]), "device": "cpu", "CASL": their_casl}
    a, b = both(theirs, ours, imports, **given, args=SimpleNamespace(num_similar=3))
    torch.testing.assert_close(a.casloss, b.casloss, rtol=1e-5, atol=1e-5)
    whole = b.casl(b.final_features, b.element_logits, b.lengths, labels)
    assert whole.isfinite() and not torch.isclose(whole, b.casloss, rtol=1e-3)


def detections(theirs, ours, imports):
    rng = np.random.default_rng(0)
    predictions = [rng.normal(0, 1, (t, 4)).astype("float32") for t in (90, 40)]
    c_score = [np.sort(p, 0)[-(len(p) // 8) :].mean(0) * [1, -1, 1, 1] for p in predictions]
    found = []
    for code, classes in ((theirs, range(4)), (ours, [None])):
        names = {
            **imports,
            "predictions": predictions,
            "c_score": c_score,
            "segment_predict": [],
            "smooth": lambda v: v,
        }
        for i, c in itertools.product(range(2), classes):
            if c is None or c_score[i][c] > 0:  # theirs sets the others to 0, which is above no threshold
                execute("migrate.md", code, {**names, "i": i, "c": c})
        found.append(sorted(names["segment_predict"]))
    assert [row[:3] for row in found[0]] == [row[:3] for row in found[1]] and len(found[0]) > 20
    np.testing.assert_allclose([row[3] for row in found[0]], [row[3] for row in found[1]], atol=1e-5)


def evaluation_of_wtalc(theirs, ours, imports):
    truth = annotated("gt.json")
    notes, names, indices = Path("Mine-Annotations"), [f"v{v}" for v in range(8)], {}
    notes.mkdir()
    columns: dict[str, Any] = {"segments": [], "labels": [], "labels_all": []}
    for name in names:
        of = [row for row in truth if row[0] == name]
        columns["segments"].append([list(row[1:3]) for row in of])
        columns["labels"].append([row[3] for row in of])
        columns["labels_all"].append(sorted({row[3] for row in of}))
    for key, rows in columns.items():
        array = np.empty(len(rows), object)
        array[:] = rows
        np.save(notes / f"{key}.npy", array)
    np.save(notes / "videoname.npy", np.array(names))
    np.save(notes / "subset.npy", np.array(["test"] * 8))
    np.save(notes / "classlist.npy", np.array(["Diving", "Shotput"]))
    np.save(notes / "duration.npy", np.full((8, 1), 200.0))

    # Detections are index ranges there.
    rows = [(v, round(s * 25 / 16), round(e * 25 / 16), label, x) for v, s, e, label, x in detected(truth)]
    indices = [(v, round(s * 25 / 16), round(e * 25 / 16), label) for v, s, e, label in truth]
    columns = {k: np.array(x) for k, x in zip(("v", "s", "e", "c", "x"), zip(*rows, strict=True), strict=True)}
    found = Detections(
        videos=tuple(names),
        classes=("Diving", "Shotput"),
        video=np.array([names.index(v) for v in columns["v"]]),
        label=np.array([["Diving", "Shotput"].index(c) for c in columns["c"]]),
        start=columns["s"] * 16 / 25,
        end=columns["e"] * 16 / 25,
        score=columns["x"],
    )

    def iou(a, b):
        one, two = (set(range(int(x[0]), int(x[1]))) for x in (a, b))
        return len(one & two) / len(one | two)

    def published(interpolated):
        levels = (0.1, 0.2, 0.3, 0.4, 0.5)
        return 100 * their_map(indices, rows, levels, iou=iou, best_first=False, interpolated=interpolated)

    def their_evaluator(stack, path, args):
        return published(False), [0.1, 0.2, 0.3, 0.4, 0.5]

    given = {
        "element_logits_stack": None,
        "args": None,
        "dataset": SimpleNamespace(path_to_annotations="Mine-Annotations"),
    }
    a, b = both(theirs, ours, imports, **given, detections=found, dmAP=their_evaluator)
    np.testing.assert_allclose(b.dmap, published(True), atol=1e-10)
    assert (b.dmap >= a.dmap - 1e-10).all() and (b.dmap > a.dmap).any() and a.iou == b.iou


def their_nms_apply(proposals, threshold=0.3):
    left, keep = sorted(proposals, key=lambda row: row[3]), []
    while left:
        keep.append(left.pop())
        of = set(range(*keep[-1][1:3]))
        overlaps = [(row, set(range(*row[1:3]))) for row in left]
        left = [row for row, other in overlaps if len(of & other) / len(of | other) < threshold]
    return keep


def nms_of_ranges(theirs, ours, imports):
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 300, 200).tolist(), rng.integers(2, 40, 200).tolist()
    rows = [[5, s, s + n, x] for s, n, x in zip(starts, lengths, rng.permutation(200) / 200, strict=True)]
    a, b = both(theirs, ours, imports, segment_predict_i=rows, nms_apply=their_nms_apply)
    assert a.segment_predict_i == b.segment_predict_i and 5 < len(rows) and len(b.segment_predict_i) < 100
    _, none = both(theirs, ours, imports, segment_predict_i=[], nms_apply=their_nms_apply)
    assert none.segment_predict_i == []


def bottom_up(theirs, ours, imports):
    torch.manual_seed(0)
    given = {"feat": torch.randn(50, 16), "bgfeat": torch.randn(1, 16), "cos": torch.nn.CosineSimilarity(dim=1)}
    a, b = both(theirs, ours, imports, **given)
    torch.testing.assert_close(a.atn_score, b.atn_score, atol=1e-6, rtol=0)


def condition_number(theirs, ours, imports):
    mat = torch.rand(2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    a, b = both(theirs, ours, imports, mat=mat)
    torch.testing.assert_close(a.pdmiloss, b.pdmiloss, atol=1e-5, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x.pdmiloss, x.mat)[0] for x in (a, b)), atol=1e-6, rtol=1e-5)


CASES = {
    "Greedy NMS": greedy_nms,
    "Greedy NMS of all classes": greedy_nms_of_all_classes,
    "Soft-NMS": soft_nms,
    "Evaluation of ActionFormer": evaluation_of_actionformer,
    "Evaluation of OpenTAD": evaluation_of_opentad,
    "Scores of classes": scores_of_classes,
    "Snippet contrast": snippet_contrast,
    "NMS with lengths plus one": nms_with_lengths_plus_one,
    "Evaluation of CoLA": evaluation_of_cola,
    "Top-k pooling": top_k_pooling,
    "Co-activity similarity": co_activity_similarity,
    "Detections": detections,
    "Evaluation of W-TALC": evaluation_of_wtalc,
    "NMS of ranges": nms_of_ranges,
    "Bottom-up attention": bottom_up,
    "Condition number": condition_number,
}
LOSSES = "The losses"  # needs stored numbers: a test of its own


def replaced(heading: str) -> tuple[str, str]:
    """Lines of theirs and of ours in a section."""
    lines = "".join(
        code for at, language, code in blocks("migrate.md") if (at, language) == (heading, "diff")
    ).splitlines()
    assert {line[0] for line in lines} == {"-", "+"}
    return tuple("\n".join(line[1:] for line in lines if line[0] == sign) for sign in "-+")  # type: ignore[return-value]


def python_of(heading: str) -> str:
    return "".join(code for at, language, code in blocks("migrate.md") if (at, language) == (heading, "python"))


@pytest.mark.parametrize("heading", CASES)
def test_migrate(heading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    imports: dict[str, Any] = {}
    execute("migrate.md", python_of("Migrate from other code"), imports)
    CASES[heading](*replaced(heading), imports)


@pytest.mark.parametrize("case", ["a", "c"])
def test_migrate_the_losses(case, shared):
    """The lines, on the numbers of the released code that are stored: a has x_ref = 0 before, c has not."""
    stored = {k: torch.from_numpy(x) for k, x in np.load(shared / "oracles" / f"release_loss_{case}.npz").items()}
    loss = D2NetLoss.from_recipe(
        "thumos14-release", num_classes=stored["tcam"].shape[2], embedding_dim=stored["feat"].shape[2]
    )
    loss.reference = stored["ref_before"].reshape(-1).clone()
    size, perms = len(stored["tcam"]), []
    for k in range(4):
        rest = [i for i in range(size) if i not in stored[f"perm{k}"].tolist()]
        perms.append(torch.tensor([*stored[f"perm{k}"].tolist(), *rest]))
    names = {"torch": torch, "device": "cpu", "pdmi_cond": True, "tcam": stored["tcam"], "tfeat": stored["feat"]}
    names |= {"seq_len": stored["lengths"].numpy(), "labels": stored["labels"].float()}
    names["loss"] = lambda *args, **settings: loss(*args, partners=torch.stack(perms), **settings)
    execute("migrate.md", replaced(LOSSES)[1], names)
    for ours, theirs in (("discriminative", "dis"), ("snippet", "lds"), ("video", "ldv")):
        torch.testing.assert_close(
            getattr(names["terms"], ours), stored[theirs].float().reshape(()), rtol=1e-4, atol=1e-5
        )
    total = stored["dis"] + 0.1 * stored["lds"] + 0.1 * stored["ldv"]
    torch.testing.assert_close(names["total_loss"], total.float().reshape(()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.reference, stored["ref_after"].float().reshape(-1), rtol=1e-4, atol=1e-5)


def test_migrate_files(tmp_path, monkeypatch):
    """The commands on the page, on files in others' layouts."""
    monkeypatch.chdir(tmp_path)
    Path("theirs").mkdir()
    rows = detected(annotated("theirs/annotations.json"))
    table = json.loads(Path("theirs/annotations.json").read_text())
    Path("theirs/annotations.json").write_text(json.dumps({"fps": 25, "feat_stride": 16, **table}))
    for name in table["database"]:
        np.save(f"theirs/{name}.npy", np.random.default_rng(0).random((312, 6), np.float32))
    Path("theirs.json").write_text(json.dumps(json_of(rows)))
    names: dict[str, Any] = {}
    for heading, language, code in blocks("migrate.md"):
        if language == "python" and heading in ("Migrate from other code", "Data and features"):
            execute("migrate.md", code, names)
        elif language == "sh":
            for line in code.splitlines():
                run(line)
    assert Path("theirs.html").stat().st_size > 100_000
    converted = open_dataset("my-data")
    assert converted.subsets == ("train", "test") and converted.stream_widths == (1024, 1024)
    seconds, first = Times(fps=30, stride=4, window=16).resolve()
    assert converted.recordings[0].first_snippet == pytest.approx(first) == pytest.approx(0.2)
    t = np.arange(5)
    np.testing.assert_allclose(first + (t + 0.5) * seconds, (t * 4 + 0.5 * 16) / 30)
    assert Times(fps=30, stride=4, middle=8).resolve() == pytest.approx((seconds, first))


def test_migrate_proposals():
    """Runs above thresholds are those of CoLA's grouping."""
    names: dict[str, Any] = {}
    execute("migrate.md", python_of("Migrate from other code") + python_of("Proposals"), names)
    assert len(names["found"].start) and int(names["found"].end[names["found"].recording == 1].max()) <= 400
    cas, thresholds = torch.rand(1, 300, 3, generator=torch.Generator().manual_seed(0)), [0.1, 0.3, 0.6]
    classes = torch.ones(1, 3, dtype=torch.bool)
    ours = extract_proposals(cas, classes, thresholds=thresholds, min_length=2, nms_iou=1)
    theirs = set()
    for threshold, c in itertools.product(thresholds, range(3)):
        above = np.where(cas[0, :, c].numpy() >= threshold)[0]
        groups = np.split(above, np.where(np.diff(above) != 1)[0] + 1)
        theirs |= {(c, int(g[0]), int(g[-1]) + 1) for g in groups if len(g) >= 2}
    assert theirs == set(zip(ours.label.tolist(), ours.start.tolist(), ours.end.tolist(), strict=True))


def test_migrate_a_trained_network(tmp_path):
    names: dict[str, Any] = {}
    execute("migrate.md", python_of("A trained network of theirs"), names)
    torch.manual_seed(0)
    width, count = 8, 3
    shapes = {"conv": (2 * width, width, 3), "conv1": (2 * width, width, 3), "classifier": (2 * count, width, 1)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    state["running_bg"] = torch.randn(1, width)

    def layer(x, name, padding):
        return F.conv1d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=padding, groups=2)

    features = torch.randn(1, 30, 2 * width)
    x = features.mT
    x = F.leaky_relu(layer(x, "conv", 1), 0.2) + x
    x = F.leaky_relu(layer(x, "conv1", 1), 0.2) + x
    rgb, flow = layer(x, "classifier", 0).mT.chunk(2, 2)
    model = names["from_released"](state, ["a", "b", "c"], names["load_recipe"]("thumos14-release"))
    names["save_model"](tmp_path / "checkpoint.safetensors", model)
    out = d2net.load_model(tmp_path)(features)
    torch.testing.assert_close(out.tcam, (rgb.sigmoid() + flow.sigmoid()) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.embeddings, (x[:, :width] + x[:, width:]).mT / 2, rtol=1e-4, atol=1e-5)


# --- All pages --------------------------------------------------------------------------------------------------------


def test_no_block_is_left_out():
    """A block that no test here runs, or a fence that is none of a block, fails."""
    for page in ("tutorial.md", "own-method.md", "migrate.md"):
        found = list(blocks(page))
        fences = re.findall(r"^ *(?:```|~~~)", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(found)
        if page != "migrate.md":  # whose tests above run what they meet
            assert {language for _, language, _ in found} <= {"python", "sh", "csv"}
            assert not [1 for heading, language, _ in found if heading == "PyTorch Lightning" and language != "python"]
    migrate = [(heading, language) for heading, language, _ in blocks("migrate.md")]
    assert {heading for heading, language in migrate if language == "diff"} == {*CASES, LOSSES}
    run_apart = {"Migrate from other code", "Data and features", "Proposals", "A trained network of theirs"}
    assert {heading for heading, language in migrate if language == "python"} == run_apart
    assert {language for _, language in migrate} == {"python", "sh", "diff"}
