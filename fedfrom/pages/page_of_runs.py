"""`write_report`: one page, which opens offline, on one or several simulations."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import fedfrom
from fedfrom.atomic import write_whole
from fedfrom.errors import BadInput
from fedfrom.pages import page
from fedfrom.pages.groups import differing, group, lines, run_data
from fedfrom.pages.look import clean
from fedfrom.pages.runs import read_runs
from fedfrom.pages.sections import sections
from fedfrom.pages.summary import summary

PAGE = "report.html"
DATA_FORMAT = 1


def write_report(runs: Sequence[Path], out: Path) -> Path:
    """Write a page on one or several simulations, and its pictures beside it.

    Parameters
    ----------
    runs : Sequence[Path]
        Results folders of `python -m simulations`, of any version; the page names the quantities that an old version
        did not record. Runs that differ in their seed alone are shown together, with 95 % intervals.
    out : Path
        The page, ending in .html; or a folder, for report.html in it. An existing page is replaced.

    Returns
    -------
    Path
        The page. It contains its pictures; a folder beside it (report-figures for report.html) has them as PNGs.

    Raises
    ------
    BadInput
        A folder holds no results, `out` can't be written, or a library of the extra `cli` is not installed.
    """
    path = _page_path(Path(out).expanduser())
    found = read_runs(runs)
    try:
        for name in ("jinja2", "scipy.stats"):
            import_module(name)
        from fedfrom.pages import figures
    except ModuleNotFoundError as error:
        raise BadInput(f"expected {error.name}, found it not installed; pip install 'fedfrom[cli]'") from None
    about = [run_data(run) for run in found]
    groups = group(found, about)
    all_lines = list(lines(groups))
    parts = sections(about, groups, all_lines)
    charts = [chart for part in parts for chart in part.charts]
    drawn = {chart["name"]: figures.draw(chart) for chart in charts}
    said = summary(groups, all_lines)
    data = {
        "format": DATA_FORMAT,
        "summary": said,
        "runs": about,
        "groups": [{"label": g.label, "runs": [run["name"] for run in g.runs]} for g in groups],
        "settings-that-differ": differing(about),
        "charts": {chart["name"]: chart for chart in charts},
    }
    names = ", ".join(run.name for run in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    text = page.render(
        f"Simulation report: {names}",
        said,
        parts,
        {name: (light, dark) for name, (_, light, dark) in drawn.items()},
        data,
        f"Made by fedfrom {fedfrom.__version__}.",
    )
    try:
        _write(path, text, {name: png for name, (png, _, _) in drawn.items()})
    except OSError as error:
        raise BadInput(f"{path}: can't be written: {error.strerror or error}; name another --out") from None
    return path


def pictures_of(path: Path) -> Path:
    """Return the folder with a page's pictures."""
    return path.with_name(f"{path.stem}-figures")


def _page_path(out: Path) -> Path:
    if out.is_dir() or not out.suffix:
        return out / PAGE
    if out.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"{clean(out)}: expected a page that ends in .html, or a folder, found {out.suffix}")
    return out


def _write(path: Path, text: str, pictures: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = pictures_of(path)
    folder.mkdir(exist_ok=True)
    earlier = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for old in folder.glob("*.png"):
        if old.stem not in pictures and f'"name":"{old.stem}"' in earlier:  # of the page that is replaced
            old.unlink()
    for name, png in pictures.items():
        write_whole(folder / f"{name}.png", png)
    write_whole(path, text)
