"""Where the bytes come from, and that none is both trained on and tested on."""

import hashlib

import pytest
import text
import torch


def tree(root, count, prefix="module"):
    for number in range(count):
        path = root / f"{prefix}{number % 7}" / f"{prefix}{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"<{prefix}{number}>" * 20)
    return root


def files_in(data, count, prefix="module"):
    content = bytes(data.tolist()).decode()
    return {number for number in range(count) if f"<{prefix}{number}>" in content}


def test_a_directory_is_split_by_file_without_a_leak(tmp_path):
    corpus = text.load(tree(tmp_path, 200))
    train, val = files_in(corpus.train, 200), files_in(corpus.val, 200)
    assert not train & val
    assert train | val == set(range(200))
    assert 2 <= len(val) <= 25  # 5 % of 200, give or take five standard deviations
    for number in range(200):
        name = f"module{number % 7}/module{number}.py"
        fraction = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        assert (number in val) == (fraction < 0.05)


def test_the_split_is_deterministic_and_stays_when_files_are_added(tmp_path):
    before, again = text.load(tree(tmp_path, 100)), text.load(tmp_path)
    assert torch.equal(before.train, again.train) and torch.equal(before.val, again.val)
    assert before.digest == again.digest
    after = text.load(tree(tmp_path, 50, prefix="added"))
    assert files_in(after.val, 100) == files_in(before.val, 100)
    assert after.digest != before.digest


def test_copies_of_a_file_are_used_once(tmp_path):
    tree(tmp_path, 100)
    names = [f"module{number % 7}/module{number}.py" for number in range(100)]
    held_out = next(name for name in names if text.is_held_out(name))
    copy = next(name for n in range(1000) if not text.is_held_out(name := f"zz{n}.py"))
    (tmp_path / copy).write_bytes((tmp_path / held_out).read_bytes())
    corpus = text.load(tmp_path)
    assert not files_in(corpus.train, 100) & files_in(corpus.val, 100)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_files_leave_one_for_the_test(tmp_path, count):
    corpus = text.load(tree(tmp_path, count))
    assert len(files_in(corpus.val, count)) == 1
    assert len(files_in(corpus.train, count)) == count - 1


def test_hidden_and_binary_files_are_left_out(tmp_path):
    tree(tmp_path, 20)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "packed").write_text("SECRET" * 100)
    (tmp_path / "image.png").write_bytes(b"PNG\0SECRET" * 100)
    corpus = text.load(tmp_path)
    assert b"SECRET" not in bytes(corpus.train.tolist()) + bytes(corpus.val.tolist())


def test_a_file_keeps_its_tail_for_the_test(tmp_path):
    data = bytes(range(256)) * 40
    (tmp_path / "data.bin").write_bytes(data)
    corpus = text.load(tmp_path / "data.bin")
    assert bytes(corpus.train.tolist()) + bytes(corpus.val.tolist()) == data
    assert len(corpus.val) == len(data) // 20


def test_the_standard_library_has_no_tests_and_no_packages():
    corpus = text.load(None)
    assert corpus.digest == text.load(None).digest
    assert len(corpus.train) > 5e6 and len(corpus.val) > 2e5
    assert b"class JSONDecoder" in corpus.train.numpy().tobytes() + corpus.val.numpy().tobytes()
    assert b"class TestCase(unittest" not in corpus.train.numpy().tobytes()


def test_text_that_cannot_be_used(tmp_path):
    with pytest.raises(text.TextError, match="no such file or directory"):
        text.load(tmp_path / "missing")
    with pytest.raises(text.TextError, match="no text files"):
        text.load(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(text.TextError, match="empty"):
        text.load(tmp_path / "empty.txt")
    (tmp_path / "short.txt").write_text("x" * 200)
    with pytest.raises(text.TextError, match=r"held-out part has 10 bytes.*--seq-len 64"):
        text.check_length(text.load(tmp_path / "short.txt"), 64)


def test_batches_are_a_function_of_seed_and_step():
    data = torch.arange(4096).mul(2654435761).remainder(256).to(torch.uint8)
    draw = {(seed, step): text.batch(data, seed=seed, step=step, batch_size=4, seq_len=16) for seed in (0, 1) for step in (0, 1, 2)}
    torch.manual_seed(123)
    again = text.batch(data, seed=1, step=2, batch_size=4, seq_len=16)
    assert torch.equal(draw[1, 2], again)
    assert len({tuple(tokens.flatten().tolist()) for tokens in draw.values()}) == 6
    assert again.shape == (4, 17) and again.dtype == torch.int64


def test_batches_are_pieces_of_the_text_and_reach_both_its_ends():
    data = torch.arange(40, dtype=torch.uint8)
    tokens = text.batch(data, seed=0, step=0, batch_size=2000, seq_len=8)
    assert (tokens.diff(dim=1) == 1).all()
    assert set(tokens[:, 0].tolist()) == set(range(40 - 8))


@pytest.mark.parametrize(("length", "count", "expected"), [(101, 100, 10), (101, 4, 4), (100, 100, 9), (11, 5, 1)])
def test_windows_predict_each_byte_at_most_once(length, count, expected):
    data = torch.arange(length, dtype=torch.uint8)
    windows = text.windows(data, count=count, seq_len=10)
    assert windows.shape == (expected, 11)
    assert (windows.diff(dim=1) == 1).all()
    predicted = windows[:, 1:].flatten().tolist()
    assert len(set(predicted)) == len(predicted)
