"""Prints one Markdown table over finished runs of all scripts; what differs in the seed alone shares a row.

  python tools/compare.py runs/*                          at most 8 columns, sorted by bytes
  python tools/compare.py runs/* --columns method,bytes,robust,macs
  python tools/compare.py runs/* --commands               below it the folders and the command of each row
  python tools/compare.py runs/* --plot FILE.png          against bytes and time (needs matplotlib)
  python tools/compare.py --refresh README.md ...         prints the tables in these files again

Columns: method, bytes, clean, robust; the first two of autoattack and verified (if a row has one), margin
and zeros (if all have one); speed, flags. --columns knows more. autoattack is of evaluate-autoattack.json in
a run's folder, what tools/evaluate.py --autoattack printed of its model.pt, and
evaluate-autoattack-dense.json of its dense.pt. The dense networks that runs started from are rows too. Of
several seeds a cell gives the mean (lowest to highest). --refresh takes each code block of kind sh with a
line `python tools/compare.py FOLDERS ...`, as seen from the repository's folder, and replaces the table
after the block by what that command prints; it draws no picture.
"""
import contextlib
import glob
import importlib.util
import json
import re
import shlex
import sys
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import Fault, Parser, UsageFault, cli, first_line  # noqa: E402

COLUMNS = {                                                      # name: (head, key in a run)
    "method": ("method", None), "bytes": ("bytes, times smaller", "bytes"), "clean": ("clean %", "clean_acc"),
    "robust": ("robust % (95 % interval, or range of seeds)", "robust_acc"),
    "autoattack": ("AutoAttack % (95 % interval); PGD on the same images", "autoattack"),
    "verified": ("verified %", "verified_acc"), "margin": ("margin loss %", "margin_acc"),
    "fgsm": ("FGSM %", "fgsm_acc"), "ifgsm": ("I-FGSM %", "ifgsm_acc"), "zeros": ("zeros %", "sparsity"),
    "dead": ("dead channels %", "channel_sparsity"), "nonzeros": ("nonzeros, times fewer", "nonzeros_ratio"),
    "macs": ("MACs, times fewer", "macs_ratio"), "speed": ("times faster, batch 128", "speed"),
    "speed1": ("times faster, batch 1", "speed1"), "flags": ("flags", "flags")}
SCRIPTS = {"cstar", "admm_prune", "hydra_prune", "binary_relax"}         # others are forks
SCHEMES = {"filter": "filters", "column": "columns", "irregular": "single weights"}
MODES = {"scratch": "from scratch", "ticket": "lottery ticket"}
OBJECTIVES = {"pgd": "", "natural": "clean images", "trades": "TRADES", "crown-ibp": "CROWN-IBP",
              "mixtrain": "MixTrain", "smooth": "smoothing"}
SCORES = {"lwm": "lowest magnitudes", "hydra": "HYDRA scores"}
OF_SEED = {"seed", "pretrained", "ticket"}                       # flags that may differ with the seed
UNREAD = dict.fromkeys(("crown-ibp", "mixtrain"), {"momentum", "step_size", "num_steps"})    # by objective
ADDED = {"binary_relax": dict(finetune_lr=None), "admm_prune": dict(admm_rise=0.2)}      # not in old results
UNSAID = {                                                       # flags in words, or that follow from others
    "script", "ratio", "bits", "budget", "rank_rule", "scheme", "group_residual", "mode", "target_width",
    "scores", "objective", "method", "admm_epochs", "prune_epochs", "relax_epochs", "finetune_epochs",
    "admm_lr", "prune_lr", "relax_lr", "finetune_lr", "admm_rise", "step_size", "amp"}
OF_TRAINING = {                                                  # flags of the run that trained a network
    "script", "train_images", "pretrain_epochs", "batch_size", "lr", "amp", "momentum", "weight_decay",
    "step_size", "num_steps", "ramp_epochs", "objective", "beta", "sigma", "final_share", "mix_images",
    "adv_weight", "nat_weight"}
OF_DENSE = OF_TRAINING | {                                       # ... and of any that started from it
    "dataset", "arch", "width", "mean", "std", "epsilon", "noise", "eval_images", "eval_steps",
    "eval_step_size", "restarts", "loss"}


def get_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="*", help="of finished runs; * and ? may stand in them")
    parser.add_argument("--columns", help="at most 8, with commas: " + ", ".join(COLUMNS))
    parser.add_argument("--commands", action="store_true", default=None, help="list the rows' folders and "
                        "commands")
    parser.add_argument("--plot", help="the picture, a .png, .pdf or .svg file")
    parser.add_argument("--refresh", nargs="+", metavar="FILE", help="Markdown files")
    args = parser.parse_args(argv)
    if bool(args.folders) == bool(args.refresh):
        parser.error("give folders of runs, or --refresh and files")
    if args.refresh:
        parser.refuse(args, "with --refresh", "columns", "plot", "commands")
    args.columns = args.columns and args.columns.split(",")
    for name in args.columns or ():
        if name not in COLUMNS or len(args.columns) > 8:
            parser.error(f"argument --columns: {name} is not one of at most 8 of {', '.join(COLUMNS)}")
    if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
        parser.error(f"argument --plot: {args.plot} does not end in .png, .pdf or .svg")
    return args


# ---------------------------------------------------------------- runs

def read_autoattack(path, run, row):
    """Adds to a row, the run or its dense network, what tools/evaluate.py --autoattack printed of its file,
    if that is kept at the path."""
    with contextlib.suppress(FileNotFoundError):
        try:
            found = json.loads(path.read_bytes())                # of PowerShell it is UTF-16
            if (found["script"], found["bytes"], found["dataset"], found["attack"]["epsilon"]) != (
                    run["script"], row["bytes"], run["args"]["dataset"], run["attack"]["epsilon"]):
                raise ValueError("it is of another file, data set or radius")
            low, high = found["autoattack_ci"]
            row["autoattack"] = (f"{decimal(found['autoattack_acc'])} ({decimal(low)} to {decimal(high)}); "
                                 f"PGD {decimal(found['robust_acc'])}; {found['images']:,} images")
        except (ValueError, KeyError, TypeError) as fault:
            print(f"left out: {path} ({first_line(fault)})", file=sys.stderr)


def read_run(folder, base):
    """A finished run: its result.json and, if it is there, AutoAttack's accuracy of its two networks."""
    run = json.loads((base / folder / "result.json").read_text()) | {"folder": folder}
    for name, batch in ("speed", "batch_128"), ("speed1", "batch_1"):
        run[name] = run["latency_ms"][batch]["dense"] / run["latency_ms"][batch]["compact"]
    run["nonzeros_ratio"] = run["dense_parameters"] / run["nonzeros"]
    run["flags"] = [flag.partition(":")[0] for flag in run["flags"]]
    ratios = dict.fromkeys(["bytes_ratio", "macs_ratio", "nonzeros_ratio", "speed", "speed1"], 1)
    run["dense"] |= dict(args=run["args"], bytes=run["dense_bytes"], flags=None, of=folder, **ratios)
    for row, name in (run, "evaluate-autoattack.json"), (run["dense"], "evaluate-autoattack-dense.json"):
        read_autoattack(base / folder / name, run, row)
    for row in run, run["dense"]:                                # what is damaged fails here, not in a table
        "".join([run["command"], *labels_of([[run]]), *(cell(column, "", [row]) for column in COLUMNS)])
        mean([row["clean_acc"], row["robust_acc"], row["bytes"], row["bytes_ratio"], *row["robust_ci"]])
    return run


def flags_of(run):
    """{flag: value as text} of all that made this run what it is, except its seed."""
    unused = OF_SEED | ({"pretrain_epochs", "ramp_epochs"} if run["args"].get("pretrained") else set())
    unused |= UNREAD.get(run["args"].get("objective"), set())    # older results have them nevertheless
    args = {k: v for k, v in (ADDED.get(run["script"], {}) | run["args"]).items() if k not in unused}
    if args.get("members"):
        args["arch"] = f"En{args.pop('members')}ResNet{args.pop('depth')}"
    args |= dict(script=run["script"], loss="+".join(run["attack"]["losses"]), device=run["device"],
                 images=run["images"])
    return {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in args.items()}      # 16 is 16.0


def same_but_seed(patterns, base):
    """A list of rows, lists of runs that differ in the seed alone, from the finished runs among the folders;
    --amp, which depends on the machine, makes rows of its own only where a seed is there twice. Fault if
    there is none, or two have one seed."""
    rows = {}
    for pattern in patterns:
        for folder in sorted(glob.glob(pattern, root_dir=base)) or [pattern]:
            folder = Path(folder).as_posix()
            try:
                run = read_run(folder, base)
                flags = {k: v for k, v in flags_of(run).items() if k != "amp"}
                rows.setdefault(json.dumps(flags, sort_keys=True), []).append(run)
            except (OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as fault:
                lacks = "it lacks " * isinstance(fault, KeyError)
                print(f"left out: {folder} holds no readable result.json ({lacks}{fault})", file=sys.stderr)
    if not rows:
        raise Fault(f"none of these folders holds a finished run: {' '.join(patterns)}")
    def twice(runs):
        return len({run["args"]["seed"] for run in runs}) < len(runs)
    parts = []
    for runs in rows.values():
        for amp in sorted({str(run["args"].get("amp")) for run in runs}) if twice(runs) else [None]:
            parts.append([run for run in runs if amp in (None, str(run["args"].get("amp")))])
    for runs in parts:
        if twice(runs):
            raise Fault("one run twice, or two of one seed, perhaps from other --pretrained files: "
                        f"{' '.join(run['folder'] for run in runs)}")
    return parts


# ---------------------------------------------------------------- what a row is called

def epochs_of_method(args):
    """The epochs of the phase that each script, or a fork, names after its paper."""
    others = {"pretrain_epochs", "finetune_epochs", "ramp_epochs"}
    return sum(n for k, n in args.items() if k.endswith("_epochs") and k not in others)


def method_of(run):
    """In words: what is compressed (with the name of a fork), how far, and how. Each may be empty."""
    args, mode, fork = run["args"], run["args"].get("mode"), run["script"] * (run["script"] not in SCRIPTS)
    first, last = epochs_of_method(args), args["finetune_epochs"]
    if args.get("bits") == 32:
        return fork, "float", f"{first + last} more epochs"
    if "bits" in args:
        bits = f"{args['bits']} bit{'s' * (args['bits'] > 1)}"
        return fork, bits, "BinaryConnect" * (args.get("method") == "bc")
    if mode == "scratch":
        return fork, f"width {args['target_width']}", MODES[mode]
    if mode in ("post", "ticket") or args.get("scores") == "lwm":          # all epochs are of fine-tuning
        first, last = 0, first + last
    scheme, scores, objective = (args.get(k, "") for k in ("scheme", "scores", "objective"))
    what = SCHEMES.get(scheme, "low rank" if "rank_rule" in args else scheme)
    rule = args.get("rank_rule", "hull")
    what += f", {rule} ranks" * (rule != "hull")
    what += ", grouped" * bool(args.get("group_residual"))
    far = f"{args['ratio']:g}x" if args.get("ratio") else ""
    far += " fewer MACs" * (args.get("budget") == "macs")
    if args.get("target_width") and what == "filters":
        far = f"width {args['width']} to {args['target_width']}"
    scores = "lwm" if scores == "hydra" and not first else scores
    how = SCORES.get(scores, scores) or ("ADMM" if first else "one-shot")
    how = [MODES.get(mode) or (how if first + last else "bare cut"),
           "not fine-tuned" if first and "finetune" not in run["seconds"] else "",
           OBJECTIVES.get(objective, objective)]
    return ", ".join(filter(None, (fork, what))), far, ", ".join(filter(None, how))


def named(words, flags, unsaid=frozenset()):
    """The words of each row and, as flag=value, the flags that have several values among the rows."""
    told = sorted({k for f in flags for k in f if len({g[k] for g in flags if k in g}) > 1} - unsaid)
    return [", ".join([w, *(f"{k}={f[k]}" for k in told if f.get(k, "None") != "None")])
            for w, f in zip(words, flags)]


def labels_of(rows):
    """What a person calls each row; if two would have one name, all flags in which these differ are added.
    Where fine-tuned rows were not trained equally long after pre-training, their epochs are."""
    flags, methods = [flags_of(runs[0]) for runs in rows], [method_of(runs[0]) for runs in rows]
    for f, method, (run, *_) in zip(flags, methods, rows):
        if method[1].startswith("width"):
            del f["width"]                                       # the words say it
        args = run["args"]
        if "finetune" in run["seconds"] and method[1] != "float" and args.get("mode") != "ticket":
            f["epochs"] = str(args["finetune_epochs"] + epochs_of_method(args))
    labels = named([", ".join(filter(None, method)) for method in methods], flags, UNSAID)
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [i for i, other in enumerate(labels) if other == label]
        for i, name in zip(alike, named([label] * len(alike), [flags[i] for i in alike])):
            labels[i] = name
    return labels


def joined(networks, more):
    """Both {key: dense network}; of one in both the smaller file, and AutoAttack's accuracy of either."""
    both = networks | more
    for key in networks.keys() & more.keys():
        large, small = sorted((networks[key], more[key]), key=lambda dense: -dense["bytes"])
        both[key] = large | small
    return both


def dense_rows(rows):
    """{label: dense networks} that the rows started from. If these differ, the label says in which flags, or
    names a run that started from them if none here trained them or two of one seed differ in no flag."""
    groups = []                                                  # of rows that share networks, one a seed
    for runs in rows:
        if runs[0]["args"].get("mode") == "scratch":             # there the network is its own dense one
            continue
        flags = flags_of(runs[0])
        trained = "pretrain_epochs" in flags and flags.get("mode") != "ticket"
        known = OF_DENSE if trained else OF_DENSE - OF_TRAINING
        same, flags = {}, [{k: flags[k] for k in sorted(known & set(flags))}]
        for run in runs:
            known_by = [run["dense"].get(k) for k in ("clean_acc", "robust_acc", "verified_acc")]
            same = joined(same, {json.dumps([run["dense_parameters"], *known_by]): run["dense"]})
        for group in groups[:]:
            both = joined(same, group[0])
            seeds = {run["args"]["seed"] for run in both.values()}
            if group[0].keys() & same.keys() and len(seeds) == len(both):
                same, flags = both, group[1] + flags
                groups.remove(group)
        groups.append((same, flags))
    flags = [{k: f[k] for f in group for k in f if len({g[k] for g in group if k in g}) == 1}
             for _, group in groups]                                 # what no two runs contradict
    merged = {}
    for label, own, (same, _) in zip(named(["dense"] * len(flags), flags), flags, groups):
        seeds = {run["args"]["seed"] for key, run in merged.get(label, {}).items() if key not in same}
        twice = seeds & {run["args"]["seed"] for run in same.values()}
        if twice or len(groups) > 1 and "pretrain_epochs" not in own:
            label += f", of {next(iter(same.values()))['of']}"
        merged[label] = same | merged.get(label, {})
    return {label: list(same.values()) for label, same in merged.items()}


# ---------------------------------------------------------------- the table, the list, the picture

def decimal(value, digits=1):
    """The number as text, halves rounded up: as floats, means of 28.95 and 33.05 would go down or up."""
    return f"{Decimal(str(value)).quantize(Decimal(10) ** -digits, ROUND_HALF_UP):,}"


def exact(values):
    """Numbers as they are printed, so that their mean has no rounding."""
    return [Decimal(str(value)) for value in values]


def spread(values, digits=1, more=""):
    """The mean, and (lowest to highest) if they differ as printed; nothing if a value is missing."""
    if None in values:
        return ""
    middle, low, high = (decimal(f(exact(values)), digits) for f in (mean, min, max))
    inside = "; ".join(filter(None, [f"{low} to {high}" if low != high else "", more]))
    return f"{middle} ({inside})" if inside else middle


def cell(column, label, runs):
    """The text of one column of a row."""
    values, seeds = [run.get(COLUMNS[column][1]) for run in runs], len({run["args"]["seed"] for run in runs})
    if column == "method":
        return label.replace("|", "\\|")
    if column == "bytes":
        return f"{spread(values, 0)}, {decimal(mean(exact(run['bytes_ratio'] for run in runs)))}x"
    if column == "robust":
        return (spread(values, more=f"{seeds} seeds" * (seeds > 1)) if len(runs) > 1 else
                "{} ({} to {})".format(*map(decimal, (*values, *runs[0]["robust_ci"]))))
    if column == "autoattack":
        return "; ".join(f"seed {run['args']['seed']}: " * (seeds > 1) + text
                         for run, text in zip(runs, values) if text)
    if column == "flags":                                        # a dense network was not checked
        return "" if None in values else "; ".join(sorted(set().union(*values))) or "none"
    return spread(values)


def render(args, base):
    """[(label, runs)] of the rows, dense networks among them, sorted by bytes; and the Markdown."""
    rows = same_but_seed(args.folders, base)
    compressed = [*zip(labels_of(rows), rows)]
    table = [*compressed, *dense_rows(rows).items()]
    more = [name for name, found, among in (
        ("autoattack", any, table), ("verified", any, table), ("margin", all, compressed),
        ("zeros", all, compressed)) if found(COLUMNS[name][1] in run for _, runs in among for run in runs)]
    columns = args.columns or ["method", "bytes", "clean", "robust", *more[:2], "speed", "flags"]
    table.sort(key=lambda row: (mean(run["bytes"] for run in row[1]), row[0]))
    lines = [[COLUMNS[column][0] for column in columns], ["---"] * len(columns),
             *([cell(column, *row) for column in columns] for row in table)]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    if args.commands:
        text += "\n<details><summary>Folders and commands of the rows</summary>\n\n" + "".join(
            f"* {label}: {', '.join(run['folder'] for run in runs)}{' (the first)' * (len(runs) > 1)} by\n"
            f"  `{runs[0]['command']}`\n" for label, runs in table if "folder" in runs[0]) + "\n</details>\n"
    return table, text


def name_points(axes, points, key):
    """Writes the short name of each point beside it, inside the axes where it hides fewest others."""
    from matplotlib.transforms import Bbox
    centers = [axes.transData.transform((p[key], p["robust"])) for p in points]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centers]
    places = [(side, -4 * side * step) for step in (1, 2, 3, 4, -1, -2) for side in (1, -1)]
    for p in (p for p in points if key in p["named"]):
        text = axes.annotate(p["short"], (p[key], p["robust"]), (0, 0), textcoords="offset points",
                             fontsize=7, color=p["color"], va="center")
        text.set_in_layout(False)

        def move(place):
            text.set(position=(6 * place[0], place[1]), ha="left" if place[0] > 0 else "right")
            return text.get_window_extent()

        def hidden(place):
            box = move(place)                                    # which is slow
            outside = not axes.bbox.x0 <= box.x0 <= box.x1 <= axes.bbox.x1
            return 9 * outside + sum(box.overlaps(other) for other in taken)
        taken.append(move(min(places, key=hidden)))


def draw(table, path):
    """Robust accuracy, with its interval or range, against bytes and against time; a colour is one method.
    Against time, points of no fewer MACs than the dense network's are only dots: they lie at 1."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter
    figure, methods, colors = Figure(figsize=(14, 5.5), layout="constrained"), {}, {"dense": "black"}
    for label, runs in table:
        what, far, how = method_of(runs[0]) if "folder" in runs[0] else ("dense", "", "")
        if what != "dense" and runs[0]["args"].get("bits", 32) < 32:
            what, how = what or "fewer bits", how * (runs[0]["args"].get("method") == "bc")
        size, speed, robust = (mean(run[k] for run in runs) for k in ("bytes", "speed", "robust_acc"))
        low, high = runs[0]["robust_ci"] if len(runs) == 1 else (
            f(run["robust_acc"] for run in runs) for f in (min, max))
        bar = robust - low, high - robust
        method = ", ".join(filter(None, (what or far, how)))
        short = ", ".join(word for word in label.split(", ") if word not in method.split(", ")) or label
        colors.setdefault(method, f"C{(len(colors) - 1) % 10}")
        fast = what == "dense" or mean(run["macs_ratio"] for run in runs) > 1.05
        point = dict(label=label, short=short, bytes=size, time=1 / speed, robust=robust, bar=bar,
                     color=colors[method], named=("bytes", "time")[:1 + fast])
        methods.setdefault(method, []).append(point)
    points = sorted(sum(methods.values(), []), key=lambda point: point["robust"])
    for axes, key, xlabel in zip(figure.subplots(1, 2, sharey=True), ("bytes", "time"), (
            "bytes of the file", "time for 128 images, dense = 1")):
        for method, own in methods.items():
            color, mark, name = own[0]["color"], *(("x", None) if method == "dense" else ("o", method))
            for p in own:
                bars = [[length] for length in p["bar"]] if key in p["named"] else None
                axes.errorbar(p[key], p["robust"], bars, fmt=mark, color=color, ecolor=(color, 0.4),
                              elinewidth=1, markersize=6 if bars else 3, label=name)
                name = None
            line = [(p[key], p["robust"]) for p in own if key in p["named"] and "=" not in p["short"]]
            axes.plot(*zip(*line), color=color, linewidth=0.8)       # of no other flags
        least, most = (f(p[key] for p in points) for f in (min, max))
        if key == "bytes":
            axes.set(xlabel=xlabel, xscale="log", xlim=(least / 1.3, most * 2.6))
            axes.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter=EngFormatter("B"),
                           minor_formatter=NullFormatter())
        else:
            axes.set(xlabel=xlabel, xlim=(0, most * 1.15))
        figure.draw_without_rendering()                          # settles the scale of the axes
        name_points(axes, points, key)
    figure.axes[0].set_ylabel("robust accuracy, % (95 % interval or range)")
    figure.axes[0].legend(loc="lower right", fontsize=8)
    drawn = "; ".join("{label}: {bytes:.0f} {time:.2f} {robust:.1f} -{bar[0]:.1f} +{bar[1]:.1f}".format(**p)
                      for p in points)
    figure.savefig(path, dpi=120, metadata={"Title": drawn})


# ---------------------------------------------------------------- --refresh, and the program

# A code block of kind sh, then perhaps a table, then perhaps a folded list.
BLOCK = re.compile(r"```sh\n((?:(?!```).)*)```\n"
                   r"(\n(?:\|[^\n]*\n)+(?:\n<details>(?:(?!</details>).)*</details>\n)?)?", re.S)


def refresh(path):
    """Replaces each table after a command of this program by what that prints; returns what changed."""
    text, changed = path.read_text(encoding="utf-8"), []

    def again(match):
        for line in match[1].splitlines():
            if line.startswith("python tools/compare.py ") and "--refresh" not in line:
                table = "\n" + render(get_args(shlex.split(line, comments=True)[2:]), ROOT)[1]
                changed.extend([line] * (table != match[2]))
                return f"```sh\n{match[1]}```\n{table}"
        return match[0]
    new = BLOCK.sub(again, text)
    if changed:
        path.write_text(new, encoding="utf-8")
    print(f"{path}: {len(changed) or 'no'} table{'s' * (len(changed) != 1)} changed")
    return changed


def main(argv=None):
    args = get_args(argv)
    if args.refresh:
        return [refresh(Path(path)) for path in args.refresh]
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UsageFault("argument --plot: matplotlib is not installed")
    table, text = render(args, Path())
    print(text, end="")
    if args.plot:
        draw(table, args.plot)
    return table


if __name__ == "__main__":
    cli(main)
