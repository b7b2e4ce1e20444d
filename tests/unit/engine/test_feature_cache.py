"""Features are kept between jobs, within bounds, and a bad file costs no job anything."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from service.engine import feature_cache
from service.engine.feature_cache import FeatureCache, forget
from service.errors import Reason, Unavailable

GUARD_S = 60.0

DIM = 1280


def rows(count: int, seed: int = 0, dim: int = DIM) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{seed:08x}{i:056x}": row
        for i, row in enumerate(rng.normal(0, 1, (count, dim)).astype(np.float32))
    }


class Notes(list[str]):
    """Collects notes."""


def opened(path: Path, max_bytes: int = 2**26, **more: object) -> tuple[FeatureCache, Notes]:
    notes = Notes()
    return FeatureCache(path, max_bytes, notes.append, **more), notes  # type: ignore[arg-type]


def test_what_was_put_is_found_by_the_next_job_to_the_last_bit(tmp_path: Path) -> None:
    kept = rows(40)
    cache, notes = opened(tmp_path / "deep" / "features.sqlite")
    assert cache.get("lite0 cpu fp32", list(kept)) == {}
    cache.put("lite0 cpu fp32", kept)
    cache.close()
    again, _ = opened(tmp_path / "deep" / "features.sqlite")
    found = again.get("lite0 cpu fp32", [*kept, "unknown"])
    assert found.keys() == kept.keys()
    assert all((found[image] == kept[image]).all() for image in kept)
    assert found["00000000" + f"{0:056x}"].dtype == np.float32
    assert notes == []


def test_spaces_do_not_mix(tmp_path: Path) -> None:
    cache, _ = opened(tmp_path / "features.sqlite")
    one, other = rows(1, seed=1), {next(iter(rows(1, seed=1))): np.zeros(3, np.float32)}
    cache.put("lite0 cpu fp32", one)
    cache.put("lite0 openvino fp32", other)
    (image,) = one
    assert (cache.get("lite0 cpu fp32", [image])[image] == one[image]).all()
    assert cache.get("lite0 openvino fp32", [image])[image].shape == (3,)
    assert cache.get("resnet18 cpu fp32", [image]) == {}


def test_an_image_and_its_views_are_forgotten_of_one_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "features.sqlite"
    (image,) = rows(1)
    other = image[:-1] + "f"
    kept = {name: np.ones(3, np.float32) for name in (image, f"{image} #fff 8", other)}
    caches = {owner: opened(file, owner=owner)[0] for owner in ("", "acme")}
    for cache in caches.values():
        cache.put("lite0 cpu fp32", kept)
        cache.put("resnet18 cpu fp32", kept)
    forget(file, "acme", image)
    for space in ("lite0 cpu fp32", "resnet18 cpu fp32"):
        assert set(caches["acme"].get(space, list(kept))) == {other}
        assert set(caches[""].get(space, list(kept))) == set(kept)
    forget(file, "", image)
    assert set(caches[""].get("lite0 cpu fp32", list(kept))) == {other}


def test_where_nothing_is_kept_nothing_is_forgotten_and_no_file_is_made(tmp_path: Path) -> None:
    forget(tmp_path / "none", "", "0" * 64)
    assert not (tmp_path / "none").exists()
    (tmp_path / "damaged").write_bytes(b"no database" * 999)
    forget(tmp_path / "damaged", "", "0" * 64)


def test_an_image_that_cannot_be_forgotten_now_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "features.sqlite"
    opened(file)[0].put("lite0", rows(1))
    monkeypatch.setattr(feature_cache, "_FORGET_S", 0.0)
    with sqlite3.connect(file, isolation_level=None) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable) as caught:
            forget(file, "", "0" * 64)
        assert caught.value.reason is Reason.STORAGE_BUSY
    holder.close()


def test_nobody_finds_what_another_owner_keeps(tmp_path: Path) -> None:
    one, other = rows(3, seed=1), rows(2, seed=1)
    acme, _ = opened(tmp_path / "features.sqlite", owner="acme")
    acme.put("lite0 cpu fp32", one)
    for owner in ("", "beta", "acme/lite0"):
        cache, _ = opened(tmp_path / "features.sqlite", owner=owner)
        assert cache.get("lite0 cpu fp32", list(one)) == {}
        cache.put("lite0 cpu fp32", {image: row + 1 for image, row in other.items()})
        cache.close()
    found = acme.get("lite0 cpu fp32", list(one))
    assert all((found[image] == row).all() for image, row in one.items())


def test_a_row_may_be_written_again(tmp_path: Path) -> None:
    cache, notes = opened(tmp_path / "features.sqlite")
    cache.put("space", {"a": np.zeros(4, np.float32)})
    cache.put("space", {"a": np.ones(4, np.float32)})
    assert cache.get("space", ["a"])["a"].tolist() == [1, 1, 1, 1]
    assert notes == []


def test_it_stays_within_its_bound_and_what_was_used_last_stays(tmp_path: Path) -> None:
    now = [0.0]
    bound = 2**20
    cache, notes = opened(tmp_path / "features.sqlite", bound, clock=lambda: now[0])
    first = rows(50, seed=1)
    cache.put("space", first)
    for day in range(1, 20):
        now[0] = day * 86400.0
        assert len(cache.get("space", list(first))) == 50, f"day {day}"
        cache.put("space", rows(50, seed=100 + day))
    kept = sum(len(cache.get("space", list(rows(50, seed=100 + day)))) for day in range(1, 20))
    assert 50 <= kept + 50 <= bound / (4 * DIM)
    assert len(cache.get("space", list(rows(50, seed=119)))) == 50
    cache.close()
    assert (tmp_path / "features.sqlite").stat().st_size <= 1.2 * bound
    assert notes == []


def test_more_than_fits_at_once_is_kept_in_part(tmp_path: Path) -> None:
    cache, notes = opened(tmp_path / "features.sqlite", 2**18)
    many = rows(200)
    cache.put("space", many)
    assert 20 < len(cache.get("space", list(many))) < 60
    assert notes == []


def test_a_row_with_a_wrong_bit_is_not_given(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    cache, notes = opened(path)
    kept = rows(3)
    cache.put("space", kept)
    cache.close()
    damaged, renamed, sound = kept
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE features SET data = zeroblob(length(data)) WHERE id ="
            " (SELECT id FROM rows WHERE image = ?)",
            (damaged,),
        )
        connection.execute("UPDATE rows SET image = 'other' WHERE image = ?", (renamed,))
    connection.close()
    again, notes = opened(path)
    assert again.get("space", [damaged, "other", sound]).keys() == {sound}
    again.put("space", {damaged: kept[damaged]})
    assert (again.get("space", [damaged])[damaged] == kept[damaged]).all()
    assert notes == []


@pytest.mark.parametrize("content", [b"no database at all" * 100, b""])
def test_a_file_that_is_no_cache_is_thrown_away_and_the_next_job_has_a_new_one(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "features.sqlite"
    path.write_bytes(content)
    cache, notes = opened(path)
    cache.put("space", rows(2))
    cache.close()
    assert len(notes) == (1 if content else 0)
    assert all("thrown away" in note for note in notes)
    again, notes = opened(path)
    again.put("space", rows(2))
    assert len(again.get("space", list(rows(2)))) == 2
    assert notes == []


def test_a_file_of_another_format_is_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    cache, notes = opened(path)
    assert cache.get("space", ["a"]) == {}
    assert "format is 99" in notes[0]
    assert not path.exists()


def test_pages_that_were_overwritten_cost_the_file_and_never_the_job(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    cache, _ = opened(path)
    kept = rows(100)
    cache.put("space", kept)
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    again, notes = opened(path)
    found = again.get("space", list(kept))
    assert all((found[image] == kept[image]).all() for image in found)
    again.put("space", kept)
    assert len(notes) == 1
    assert "thrown away" in notes[0]


def test_a_lock_that_another_holds_is_not_waited_for_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "BUSY_S", 0.01)
    path = tmp_path / "features.sqlite"
    cache, _ = opened(path)
    cache.put("space", rows(1))
    cache.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    cache, notes = opened(path)
    # In WAL, readers wait for no writer.
    assert len(cache.get("space", list(rows(1)))) == 1
    cache.put("space", rows(1, seed=2))
    assert len(notes) == 1
    assert "goes on without it" in notes[0]
    cache.put("space", rows(1, seed=3))
    assert cache.get("space", list(rows(1))) == {}
    assert len(notes) == 1
    other.close()
    assert path.exists()


def test_a_folder_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache, notes = opened(tmp_path / "file" / "features.sqlite")
    cache.put("space", rows(1))
    assert cache.get("space", list(rows(1))) == {}
    assert len(notes) == 1
    assert "goes on without it" in notes[0]


def test_a_full_disk_costs_a_note(tmp_path: Path) -> None:
    cache, notes = opened(tmp_path / "features.sqlite")
    cache.put("space", rows(1))
    connection = cache._connection
    assert connection is not None
    # What SQLite says when the file system has no more blocks.
    connection.execute("PRAGMA max_page_count = 1")
    cache.put("space", rows(200, seed=2))
    assert len(notes) == 1
    assert "full" in notes[0]
    assert "goes on without it" in notes[0]
    again, notes = opened(tmp_path / "features.sqlite")
    assert len(again.get("space", list(rows(1)))) == 1
    assert notes == []


def test_processes_share_one_file_from_its_first_moment(tmp_path: Path) -> None:
    path = tmp_path / "features.sqlite"
    program = (
        "import sys, numpy as np; from pathlib import Path;"
        "from service.engine import feature_cache;"
        "from service.engine.feature_cache import FeatureCache;"
        # What a starved writer holds up is waited for.
        f"feature_cache.BUSY_S = {GUARD_S};"
        "me = sys.argv[2]; notes = [];"
        "cache = FeatureCache(Path(sys.argv[1]), 2**26, notes.append);"
        "[cache.put('space', {f'{me} {i}': np.full(64, i, np.float32)}) for i in range(50)];"
        "sys.exit(bool(notes))"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", program, str(path), str(n)]) for n in range(3)
    ]
    assert [process.wait(GUARD_S) for process in started] == [0, 0, 0]
    cache, _ = opened(path)
    keys = [f"{n} {i}" for n in range(3) for i in range(50)]
    found = cache.get("space", keys)
    assert all(found[key][0] == int(key.split()[1]) for key in keys)
