"""Work that is shared: every item once, whoever does it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread

from ddk_cache.build.share import share
from ddk_cache.storage.lease import Leases
from ddk_cache.storage.local import LocalStorage


@dataclass
class Files:
    """A job whose items are names of files to be written."""

    folder: Path
    leases: Leases
    count: int = 12
    worked: list[str] = field(default_factory=list)

    def todo(self) -> list[str]:
        return [name for name in map(str, range(self.count)) if not self.done(name)]

    def done(self, item: str) -> bool:
        return (self.folder / item).exists()

    def lease(self, item: str) -> str:
        return f"{item}.lease"

    def work(self, item: str) -> None:
        self.worked.append(item)
        (self.folder / item).touch()
        self.leases.release(self.lease(item))

    def flush(self) -> None:
        pass


def test_two_workers_do_every_item_once(tmp_path: Path) -> None:
    jobs = [Files(tmp_path, Leases(LocalStorage(tmp_path))) for _ in range(2)]
    threads = [
        Thread(target=share, args=(job, job.leases, rank, 2)) for rank, job in enumerate(jobs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(jobs[0].worked + jobs[1].worked) == sorted(map(str, range(12)))


def test_a_worker_begins_at_its_own_share(tmp_path: Path) -> None:
    job = Files(tmp_path, Leases(LocalStorage(tmp_path)))
    share(job, job.leases, 2, 3)
    assert job.worked == [*map(str, [*range(2, 12, 3), *range(0, 12, 3), *range(1, 12, 3)])]
