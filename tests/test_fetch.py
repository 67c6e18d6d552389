"""Public data sets: fetched from a server of this machine that breaks off, changes its mind, and lies."""

import errno
import hashlib
import http.server
import io
import json
import os
import shutil
import tarfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from lib import archives, downloads, fetch, sources
from lib.downloads import Remote
from lib.errors import CourseError

CONTENT = os.urandom(300_000)
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Shelf(http.server.ThreadingHTTPServer):
    """Files by path; `ranges`: whether it gives parts; `cuts`: after how many bytes the next answers break off;
    `tag`: the files' ETag. `seen`: what was asked for and how many bytes were sent."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.seen, self.cuts, self.ranges, self.tag, self.statuses = {}, [], [], True, '"one"', []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """Quiet: answers break off on purpose."""


class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Quiet."""

    def do_GET(self):
        shelf, asked = self.server, self.headers.get("Range")
        content = shelf.files.get(self.path)
        status = shelf.statuses.pop(0) if shelf.statuses else 200 if content is not None else 404
        if status != 200:
            return self.send_error(status)
        start = 0
        if asked and shelf.ranges and self.headers.get("If-Range") == shelf.tag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        cut = shelf.cuts.pop(0) if shelf.cuts else len(content)
        self.send_header("Content-Length", str(len(content) - start))
        if shelf.tag:
            self.send_header("ETag", shelf.tag)
        self.end_headers()
        shelf.seen.append((self.path, asked, len(content[start : start + cut])))
        self.wfile.write(content[start : start + cut])
        self.close_connection = True


@pytest.fixture
def shelf(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    monkeypatch.setattr(downloads, "PIECE", 10_000)
    with Shelf() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.files["/a.bin"] = CONTENT
        yield server
        server.shutdown()


@pytest.fixture
def remote(shelf):
    return Remote(f"{shelf.url}/a.bin", "a.bin", MD5)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_is_not_asked_for_twice(shelf, remote, tmp_path):
    for _ in range(2):
        assert downloads.fetch(remote, tmp_path) == hashlib.sha256(CONTENT).hexdigest()
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert names(tmp_path) == ["a.bin"]
    assert shelf.seen == [("/a.bin", None, 300_000)]


def test_git_s_checksum_is_that_of_git(shelf, tmp_path):
    shelf.files["/hello"] = b"hello\n"  # git hash-object of it:
    remote = Remote(f"{shelf.url}/hello", "hello", "git:ce013625030ba8dba906f756967f9e9ca394464a")
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "hello").read_bytes() == b"hello\n"


def test_a_connection_that_breaks_off_is_taken_up_where_it_stopped(shelf, remote, tmp_path):
    shelf.cuts = [50_000, 0, 120_000]
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked for _, asked, _ in shelf.seen] == [None, "bytes=50000-", "bytes=50000-", "bytes=170000-"]
    assert sum(sent for *_, sent in shelf.seen) == len(CONTENT)


def test_a_later_call_asks_only_for_what_is_missing(shelf, remote, tmp_path):
    shelf.cuts = [100_000] + [0] * downloads.ATTEMPTS
    with pytest.raises(CourseError, match=r"did not come whole: .* 0\.1 MB are kept(.|\n)*goes on from there"):
        downloads.fetch(remote, tmp_path)
    assert names(tmp_path) == ["a.bin.part", "a.bin.part.json"]
    shelf.seen.clear()
    downloads.fetch(remote, tmp_path)
    assert shelf.seen == [("/a.bin", "bytes=100000-", 200_000)]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(shelf, remote, tmp_path):
    shelf.cuts = [100_000] + [0] * downloads.ATTEMPTS
    with pytest.raises(CourseError):
        downloads.fetch(remote, tmp_path)
    other = CONTENT[::-1]
    shelf.files["/a.bin"], shelf.tag = other, '"two"'
    downloads.fetch(replace(remote, checksum="md5:" + hashlib.md5(other).hexdigest()), tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == other
    assert shelf.seen[-1] == ("/a.bin", "bytes=100000-", 300_000)


@pytest.mark.parametrize(("ranges", "tag"), [(False, '"one"'), (True, ""), (True, 'W/"weak"')])
def test_without_parts_or_a_mark_of_the_file_it_begins_anew(shelf, remote, tmp_path, ranges, tag):
    shelf.ranges, shelf.tag, shelf.cuts = ranges, tag, [100_000]
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [sent for *_, sent in shelf.seen] == [100_000, 300_000]


def test_a_server_in_trouble_is_asked_again_once_something_came(shelf, remote, tmp_path):
    shelf.cuts, shelf.statuses = [100_000], [200, 503, 502]
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_what_came_kept_aside(shelf, remote, tmp_path):
    shelf.files["/a.bin"] = b"x" + CONTENT[1:]
    for _ in range(2):
        with pytest.raises(CourseError, match=r"wrong checksum: md5:.* instead of md5:(.|\n)*source has changed"):
            downloads.fetch(remote, tmp_path)
        assert names(tmp_path) == ["a.bin.part.json", "a.bin.refused"]
    shelf.files["/a.bin"], shelf.tag = CONTENT, '"two"'
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_file_that_is_there_and_damaged_is_refused(shelf, remote, tmp_path):
    (tmp_path / "a.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(CourseError, match="wrong checksum"):
        downloads.fetch(remote, tmp_path)
    downloads.fetch(remote, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_what_is_not_there_is_said_at_once(shelf, remote, tmp_path):
    with pytest.raises(CourseError, match=r"cannot be had: the server says 404(.|\n)*moved"):
        downloads.fetch(replace(remote, url=f"{shelf.url}/b.bin"), tmp_path)
    shelf.server_close()
    with pytest.raises(CourseError, match=r"did not come whole: Connection refused(.|\n)*reaches the net"):
        downloads.fetch(replace(remote, url="http://127.0.0.1:9/a.bin"), tmp_path)


def test_a_disk_without_room_is_seen_before_a_byte_is_kept(shelf, remote, tmp_path, monkeypatch):
    free = downloads.SLACK + 450_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, free))
    with pytest.raises(CourseError, match=r"268\.9 MB free, and 269\.0 MB are needed(.|\n)*--to"):
        downloads.fetch(remote, tmp_path, copies=1)
    assert (tmp_path / "a.bin.part").stat().st_size == 0
    downloads.fetch(remote, tmp_path)


def test_a_disk_that_fills_up_keeps_what_came(shelf, remote, tmp_path, monkeypatch):
    written = downloads._write

    def full(file, piece, part):
        if part.stat().st_size >= 100_000:
            file = io.FileIO("/dev/full", "w")
        written(file, piece, part)

    monkeypatch.setattr(downloads, "_write", full)
    with pytest.raises(CourseError, match=r"after 0\.1 MB: No space left on device\.\nMake room"):
        downloads.fetch(remote, tmp_path)
    monkeypatch.setattr(downloads, "_write", written)
    downloads.fetch(remote, tmp_path)
    assert shelf.seen[-1] == ("/a.bin", "bytes=100000-", 200_000)


def test_two_processes_do_not_write_on_one_part(shelf, remote, tmp_path):
    with open(tmp_path / "a.bin.part", "ab") as other:
        downloads._claim(other, tmp_path / "a.bin.part")
        with pytest.raises(CourseError, match="another process"):
            downloads.fetch(remote, tmp_path)


def tar(files):
    """A tar archive of contents by name; a TarInfo may stand for a name."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, content in files:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return target.getvalue()


def link(name, kind, to):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("../x", b"1"),
        ("/etc/x", b"1"),
        ("a/../../x", b"1"),
        (link("x", tarfile.SYMTYPE, "/etc/passwd"), b""),
        (link("x", tarfile.LNKTYPE, "../x"), b""),
        (link("x", tarfile.CHRTYPE, ""), b""),
    ],
)
def test_an_archive_that_leads_out_of_its_folder_is_refused_before_anything_is_written(tmp_path, member):
    (tmp_path / "a.tar").write_bytes(tar([("fine", b"1"), member]))
    (tmp_path / "into").mkdir()
    with pytest.raises(CourseError, match=r"not safe|a link or a device"):
        archives.unpack_tar(tmp_path / "a.tar", tmp_path / "into", "Cure.")
    assert names(tmp_path) == ["a.tar", "into"]
    assert names(tmp_path / "into") == []


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"no archive" * 100, lambda b: b""])
def test_an_archive_that_breaks_off_is_refused(tmp_path, damage):
    (tmp_path / "a.tar").write_bytes(damage(tar([("a", bytes(20_000)), ("b", bytes(20_000))])))
    (tmp_path / "into").mkdir()
    with pytest.raises(CourseError, match="is damaged"):
        archives.unpack_tar(tmp_path / "a.tar", tmp_path / "into", "Cure.")


@pytest.fixture
def scans(brats):
    """Contents by name of three patients with FLAIR and mask."""
    folder = brats(3)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.nii.gz"))}


@pytest.fixture
def public(shelf, scans, monkeypatch):
    """A data set `small` on the shelf, an archive with one folder at its top."""

    def place(content=None):
        archive = content or tar([("top/._p0", b"junk"), *((f"top/{name}", data) for name, data in scans.items())])
        shelf.files["/small.tar"] = archive
        remote = Remote(f"{shelf.url}/small.tar", "small.tar", "md5:" + hashlib.md5(archive).hexdigest())
        source = sources.Source("Small", "CC0", "https://example.org", 3, ("FLAIR",), True, 1e6, "SMALL",
                                remotes=lambda: [remote], checksums="The MD5 is ours")  # fmt: skip
        monkeypatch.setitem(sources.SOURCES, "small", source)
        return source

    place()
    return place


def test_a_data_set_comes_is_unpacked_and_the_course_s_line_is_said(public, tmp_path, scans, capsys):
    assert fetch.main(["small", "--to", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out
    assert "Licence: CC0" in said
    assert "some 1.0 MB" in said
    assert f"./run_all.sh --data {tmp_path}/new/SMALL --modality FLAIR" in said
    assert names(tmp_path / "new") == ["SMALL", "SMALL.json"]
    found = {str(p.relative_to(tmp_path / "new/SMALL")): p.read_bytes() for p in (tmp_path / "new").rglob("*.nii.gz")}
    assert found == scans
    assert fetch.main(["small", "--to", str(tmp_path / "new")]) == 0
    assert "there already" in capsys.readouterr().out


def test_a_second_fetch_is_compared_with_the_first(public, tmp_path, capsys):
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0
    shutil.rmtree(tmp_path / "SMALL")
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0
    assert "earlier time" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "SMALL")
    note = json.loads((tmp_path / "SMALL.json").read_text())
    (url,) = note["sha256"]
    (tmp_path / "SMALL.json").write_text(json.dumps(note | {"sha256": {url: "other"}}))
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0
    assert "1 of 1 files are not those of the earlier time" in capsys.readouterr().out


def test_nothing_is_in_place_before_it_is_whole(public, shelf, tmp_path, capsys):
    shelf.cuts = [5_000] + [0] * downloads.ATTEMPTS
    place = tmp_path / "new"
    assert fetch.main(["small", "--to", str(place)]) == 1
    assert "goes on from there" in capsys.readouterr().err
    assert names(place) == ["SMALL.part"]
    shelf.seen.clear()
    assert fetch.main(["small", "--to", str(place)]) == 0
    assert shelf.seen[0][1] == "bytes=5000-"
    assert names(place) == ["SMALL", "SMALL.json"]


def test_an_interrupt_keeps_the_part_and_says_so(public, shelf, tmp_path, capsys, monkeypatch):
    written = downloads._write

    def interrupted(file, piece, part):
        written(file, piece, part)
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_write", interrupted)
    assert fetch.main(["small", "--to", str(tmp_path)]) == 130
    assert "goes on from there" in capsys.readouterr().err
    kept = (tmp_path / "SMALL.part" / "small.tar.part").stat().st_size
    monkeypatch.setattr(downloads, "_write", written)
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0
    assert kept == 10_000
    assert shelf.seen[-1][1] == "bytes=10000-"


def test_an_unsafe_archive_of_a_source_leaves_nothing_in_place(public, tmp_path, capsys):
    public(tar([("../p0/p0_flair.nii.gz", b"1")]))
    assert fetch.main(["small", "--to", str(tmp_path / "new")]) == 1
    assert "not safe" in capsys.readouterr().err
    assert names(tmp_path / "new") == ["SMALL.part"]


def test_a_disk_that_is_full_when_unpacking_is_said(public, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", full)
        assert fetch.main(["small", "--to", str(tmp_path)]) == 1
    assert "cannot be unpacked: No space left" in capsys.readouterr().err
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0


def test_a_data_set_that_lacks_something_is_not_whole(public, tmp_path, capsys):
    assert fetch.main(["small", "--to", str(tmp_path)]) == 0
    (tmp_path / "SMALL" / "p1" / "p1_seg.nii.gz").unlink()
    shutil.rmtree(tmp_path / "SMALL" / "p2")
    assert fetch.main(["small", "--check", str(tmp_path / "SMALL")]) == 1
    said = capsys.readouterr().err
    assert "1 subjects have FLAIR and lesion mask, and 3 belong to it." in said
    assert "No lesion mask: p1." in said


def mslub(shelf, patients):
    """MSLUB's listing on the shelf, and its files."""
    kinds = ("FLAIR_N4", "T1_N4", "T2_N4", "T1POST_N4", "GOLD_STANDARD_N4")
    paths = [f"cross_sectional/MNI/patient{i:02d}/{kind}_regtoMNI.nii.gz" for i in patients for kind in kinds]
    tree = [{"path": "cross_sectional/raw/patient01/FLAIR.nii.gz", "type": "blob", "sha": "0", "size": 1}]
    for path in paths:
        content = path.encode()
        shelf.files[f"/files/{path}"] = content
        sha = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        tree.append({"path": path, "type": "blob", "sha": sha, "size": len(content)})
    shelf.files["/tree"] = json.dumps({"tree": tree}).encode()


def test_mslub_comes_file_by_file_with_the_checksums_of_its_listing(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MSLUB_TREE", f"{shelf.url}/tree")
    monkeypatch.setattr(sources, "MSLUB_FILES", f"{shelf.url}/files")
    mslub(shelf, range(1, 31))
    shelf.cuts = [10**6, 10**6, 10**6, 20] + [0] * downloads.ATTEMPTS
    with pytest.raises(CourseError, match="goes on from there"):
        sources.bring(sources.SOURCES["mslub"], tmp_path)
    shelf.seen.clear()
    folder, _ = sources.bring(sources.SOURCES["mslub"], tmp_path)
    assert len(list(folder.glob("patient*/*.nii.gz"))) == 150
    assert (folder / "patient30" / "T1_N4_regtoMNI.nii.gz").read_bytes().endswith(b"patient30/T1_N4_regtoMNI.nii.gz")
    assert len(shelf.seen) == 149  # the listing, the rest of the third file, and 147 others
    assert shelf.seen[1][1] == "bytes=20-"


@pytest.mark.parametrize("patients", [range(1, 30), []])
def test_a_repository_that_is_not_what_it_was_is_refused(shelf, tmp_path, monkeypatch, patients):
    monkeypatch.setattr(sources, "MSLUB_TREE", f"{shelf.url}/tree")
    mslub(shelf, patients)
    with pytest.raises(CourseError, match="30 belong to it"):
        sources.bring(sources.SOURCES["mslub"], tmp_path)
    shelf.files["/tree"] = b"<html>"
    with pytest.raises(CourseError, match="no answer that can be read"):
        sources.bring(sources.SOURCES["mslub"], tmp_path)


def test_the_list_names_every_data_set_with_its_licence(capsys):
    assert fetch.main([]) == 0
    said = capsys.readouterr().out
    for name, source in sources.SOURCES.items():
        assert f"{name} " in said
        assert source.licence in said
        assert source.page in said
    assert said.count("registration ") == sum(source.remotes is None for source in sources.SOURCES.values())


@pytest.mark.parametrize("name", [name for name, source in sources.SOURCES.items() if not source.remotes])
def test_what_needs_a_registration_is_told_step_by_step_and_checked(name, tmp_path, brats, capsys):
    assert fetch.main([name]) == 0
    said = capsys.readouterr().out
    assert sources.SOURCES[name].page in said
    assert f"python -m lib.fetch {name} --check" in said
    assert "{" not in said
    assert fetch.main([name, "--check", str(brats(2, modalities=("FLAIR", "T1")))]) == 1
    assert f"{sources.SOURCES[name].subjects} belong to it" in capsys.readouterr().err
    assert fetch.main([name, "--check", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("call", [["ixi"], ["--check", "DIR"], ["ixi_t1", "--all"]])
def test_a_call_that_makes_no_sense_is_refused(call, capsys):
    assert fetch.main(call) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_the_addresses_and_checksums_are_whole():
    for remote in (*sources._ixi("T1"), *sources._ixi("T2"), *sources._decathlon()):
        assert remote.url.startswith("https://")
        assert remote.url.endswith(remote.name)
        assert len(remote.checksum) == len("md5:") + 32
    assert Path(sources.SOURCES["ixi_t1"].folder).parent == Path(sources.SOURCES["ixi_t2"].folder).parent
