"""The search of one row: every setting is scored on the validation half, the best one on the reported half."""

from typing import Any

from simulations.studies.paper.arena import Arena, mean_accuracy
from simulations.studies.paper.data import REPORTED, VALIDATION
from simulations.studies.paper.grids import Row, Setting
from simulations.studies.paper.merging import Clients, Merged
from simulations.studies.paper.options import TASKS


def search(row: Row, candidates: int, clients: Clients, arena: Arena) -> dict[str, Any]:
    """Return every candidate's scores on the validation half, and the chosen one's on the reported half.

    Parameters
    ----------
    row : Row
        Method and grid.
    candidates : int
        Number of settings tried, from the start of the grid.
    clients : Clients
        The states that are merged.
    arena : Arena
        The model that scores them.

    Notes
    -----
    The setting with the best mean accuracy over the tasks is chosen; of equal ones that with the lower mean loss, then
    the earlier one in the grid. Settings that a method refuses for these clients are left out. The greedy soup also
    chooses its clients on the validation half, by 2 n - 1 further scores at server_lr 1.
    """
    merging = _Greedy(clients, arena) if row.method == "greedy-soup" else _Plain(row.method, clients)
    tried: list[dict[str, Any]] = []
    for setting in row.grid[:candidates]:
        try:
            state, report = merging(setting)
        except ValueError:  # refused for these clients, as ACTMat is where it interpolates; the first never is
            continue
        tried.append({"setting": setting, "scores": arena.score(state, TASKS, VALIDATION, report.config)})
    chosen = max(range(len(tried)), key=lambda i: (*_merit(tried[i]["scores"]), -i))
    setting = tried[chosen]["setting"]
    state, report = merging(setting)
    return {
        "candidates": tried,
        "chosen": setting,
        "clients": report.clients,
        "reported": arena.score(state, TASKS, REPORTED, report.config),
        "interference": report.interference,
    }


def _merit(scores: dict[str, dict[str, float]]) -> tuple[float, float]:
    return round(mean_accuracy(scores), 9), -sum(found["loss"] for found in scores.values())


class _Plain:
    """Merges all clients by one method."""

    def __init__(self, method: str, clients: Clients) -> None:
        self._method, self._clients = method, clients

    def __call__(self, setting: Setting) -> Merged:
        return self._clients.merge(self._method, setting)


class _Greedy(_Plain):
    """Merges the clients that a greedy soup keeps, by their mean."""

    def __init__(self, clients: Clients, arena: Arena) -> None:
        kept = clients.soup(lambda state: mean_accuracy(arena.score(state, TASKS, VALIDATION, _product(clients))))
        super().__init__("average", clients.some(kept))


def _product(clients: Clients) -> dict[str, Any] | None:
    """Return the configuration of merged adapters, whose B includes the scaling; `validate` is not given it."""
    return (
        None if clients.config is None else {**clients.config, "lora_alpha": clients.config["r"], "use_rslora": False}
    )
