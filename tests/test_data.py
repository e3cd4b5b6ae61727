import itertools
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paper_lib import data
from paper_lib.data import TensorDataset
from paper_lib.data.augment import FlipCrop
from paper_lib.errors import ConfigError


def numbered(n=103, n_test=17, **kwargs):
    """A dataset whose images are their own row numbers; test images count from 1000."""
    x, x_test = torch.arange(n).view(-1, 1, 1, 1), 1000 + torch.arange(n_test).view(-1, 1, 1, 1)
    labels = torch.arange(n) % 5, torch.arange(n_test) % 5
    return data.from_tensors(
        x.float(), labels[0], x_test.float(), labels[1], device="cpu", **kwargs
    )


def augmented(n=60, held_out=20, seed=0):
    """Random uint8 images, flipped and cropped."""
    rng = np.random.default_rng(7)
    x = [torch.from_numpy(rng.integers(0, 256, (n, 3, 8, 8), dtype=np.uint8)) for _ in range(2)]
    y = [torch.from_numpy(rng.integers(0, 4, n)) for _ in range(2)]
    images, labels = ({"train": train, "test": test} for train, test in (x, y))
    scale = {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    dataset = TensorDataset("toy", images, labels, 4, augment=FlipCrop(2), **scale)
    return dataset.hold_out(held_out, seed)


def ids(x):
    return x.flatten().int().tolist()


def equal(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def test_an_epoch_is_a_permutation_without_its_ragged_tail():
    stream = numbered(103).stream(0, 20, 10, seed=0)
    first, second = np.array([ids(x) for x, _ in stream]).reshape(2, 100)
    assert len(set(first)) == len(set(second)) == 100 and first.tolist() != second.tolist()
    assert set(first) != set(second)  # another tail is dropped


def test_order_and_fingerprints_are_pinned():
    """Finished runs rely on them: a change must be a decision, not an accident."""
    x, y = numbered().batch(0, 4, seed=0)
    assert ids(x) == [88, 100, 17, 28] and y.tolist() == [3, 0, 2, 3] and y.dtype == torch.int64
    assert (
        numbered().fingerprint == "1c072f78d7df0412"
        and augmented().fingerprint == "81949a92df004af3"
    )


def test_held_out_images_are_never_trained_on():
    dataset = numbered(103, held_out=20, seed=5)
    train = {i for step in range(30) for i in ids(dataset.batch(step, 8, seed=0)[0])}
    held = {i for step in range(10) for i in ids(dataset.batch(step, 8, seed=0, split="held")[0])}
    assert dataset.sizes == {"train": 83, "held": 20, "test": 17}
    assert train | held == set(range(103)) and not train & held
    other = {i for x, _ in numbered(103, held_out=20, seed=6).evaluation("held") for i in ids(x)}
    assert other != held


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**40), n=st.sampled_from([1, 2, 3, 6, 12]))
def test_parts_share_the_global_batch(step, seed, n):
    dataset = augmented()
    x, y = dataset.batch(step, 12, seed)
    for i in range(n):
        part = dataset.part(i, n)
        assert equal(part.batch(step, 12, seed), (x[i::n], y[i::n]))
        assert part.fingerprint == dataset.fingerprint and part.sizes == dataset.sizes
    assert equal(dataset.part(1, 2).part(2, 3).batch(step, 12, seed), (x[5::6], y[5::6]))


@pytest.mark.parametrize("split", ["train", "held", "test"])
def test_a_batch_does_not_depend_on_what_was_asked_before(split):
    fresh = [augmented().batch(step, 8, 3, split) for step in range(12)]
    dataset = augmented()
    for step in reversed(range(12)):
        dataset.batch(step + 100, 5, seed=9)
        assert equal(dataset.batch(step, 8, 3, split), fresh[step])
    streamed = dataset.stream(4, 12, 8, 3, split)
    assert all(equal(a, b) for a, b in zip(streamed, fresh[4:], strict=True))
    x, y = dataset.batches([2, 7], 8, 3, split)
    assert equal((x[1], y[1]), fresh[7]) and x.shape == (2, 8, 3, 8, 8) and y.shape == (2, 8)
    assert torch.equal(dataset.batches(3, 8, 3, split)[0][2], fresh[2][0])


def test_seeds_steps_and_splits_augment_differently():
    cases = list(itertools.product((0, 1), [20], (0, 1), ("train", "held")))
    assert len({augmented()._plan(*case)[2].tobytes() for case in cases}) == len(cases) == 8


def test_the_global_random_numbers_are_untouched_and_change_nothing():
    batches = []
    for seed in (0, 1):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        dataset = augmented()
        batches.append([*dataset.stream(0, 20, 8, 0), *dataset.evaluation()])
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
    assert all(equal(a, b) for a, b in zip(*batches, strict=True))


def test_evaluation_shows_every_image_once_as_it_is():
    dataset = augmented(n=60, held_out=0)
    chunks = list(dataset.evaluation("train", size=25))
    assert [len(y) for _, y in chunks] == [25, 25, 10]
    shown = torch.cat([x for x, _ in chunks]).mul(0.2).add(0.5).mul(255).round().to(torch.uint8)
    original = dataset._images["train"]
    assert sorted(shown.flatten(1).tolist()) == sorted(original.flatten(1).tolist())
    again = list(dataset.evaluation("train", size=25))
    assert all(equal(a, b) for a, b in zip(chunks, again, strict=True))


def test_evaluation_with_a_limit_is_a_fair_sample():
    x = torch.arange(1000).view(-1, 1)
    sorted_by_class = (x.float(), x[:, 0] // 100) * 2
    dataset = data.from_tensors(*sorted_by_class, device="cpu")
    chunks = list(dataset.evaluation("train", size=120, limit=300))
    labels = torch.cat([y for _, y in chunks])
    assert [len(y) for _, y in chunks] == [120, 120, 60]
    assert torch.bincount(labels, minlength=10).min() > 10
    assert sum(len(y) for _, y in dataset.evaluation(limit=5000)) == 1000


def test_uint8_tensors_are_normalized_by_the_training_images():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 200, (500, 2, 4, 4), dtype=np.uint8))
    y = torch.arange(500, dtype=torch.int32) % 2
    dataset = data.from_tensors(x, y, x[:10] // 2, y[:10], device="cpu")
    (shown, _), *_ = dataset.evaluation("train", size=500)
    assert shown.dtype == torch.float32
    std, mean = torch.std_mean(shown, (0, 2, 3), correction=0)
    torch.testing.assert_close(mean, torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, torch.ones(2), atol=1e-5, rtol=0)


def test_tensors_go_where_training_is_fastest_unless_told(monkeypatch):
    gpu = torch.device("meta")  # stands for one
    monkeypatch.setattr(data.dataset, "default_device", lambda: gpu)
    x, y = torch.zeros(6, 3), torch.arange(6)
    dataset = data.from_tensors(x, y, x, y)
    assert (
        dataset.device == dataset._images["train"].device == dataset._labels["test"].device == gpu
    )
    assert data.from_tensors(x, y, x, y, device="cpu").batch(0, 2, 0)[0].device.type == "cpu"


def test_arrays_are_accepted():
    x, y = np.zeros((6, 3), dtype=np.float64), np.arange(6)
    dataset = data.from_tensors(x, y, x, y, name="mine")
    assert (dataset.name, dataset.n_classes, dataset.shape) == ("mine", 6, (3,))
    assert dataset.batch(0, 2, 0)[0].dtype == torch.float32


def test_the_fingerprint_is_that_of_the_content():
    first = augmented().fingerprint
    assert augmented().fingerprint == first == augmented().to("cpu").fingerprint
    others = [augmented(held_out=19), augmented(seed=1), augmented(n=61)]
    pixel = augmented()
    pixel._images["train"][3, 1, 4, 4] ^= 1
    label = augmented()
    label._labels["test"][5] += 1
    prints = [dataset.fingerprint for dataset in (*others, pixel, label)]
    assert first not in prints and len(set(prints)) == len(prints)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("give", [lambda tensor: tensor, lambda tensor: tensor.numpy()])
def test_what_is_written_into_own_tensors_later_changes_no_dataset(kind, give):
    x, y = torch.arange(96).reshape(6, 1, 4, 4).to(kind), torch.arange(6) % 2
    dataset = data.from_tensors(*map(give, (x, y, x, y)), device="cpu")
    before = dataset.batch(0, 6, 0)
    x.zero_(), y.zero_()
    assert all(map(torch.equal, dataset.batch(0, 6, 0), before))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"size": 84},
            "batch size = 84 .* must be from 1 to the 83 images of split 'train'",
        ),
        ({"size": 0}, "batch size = 0"),
        ({"size": 9, "parts": 2}, "batch size = 9 .* must be a multiple of 2 parts"),
        ({"parts": 1}, "part = 1 .* must be from 0 to 0"),
        ({"step": -1}, r"step, seed = \(-1, 0\)"),
        ({"seed": -1}, r"step, seed = \(0, -1\)"),
        ({"split": "valid"}, r"unknown split 'valid' \(allowed: train, held, test\)"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        part = numbered(held_out=20).part(1, arguments.pop("parts", 3))
        part.batch(**{"step": 0, "size": 12, "seed": 0} | arguments)


@pytest.mark.parametrize("held_out", [-1, 103])
def test_impossible_held_out_is_refused(held_out):
    with pytest.raises(ValueError, match="split = 'held' .* empty; .* held_out > 0"):
        numbered().batch(0, 8, 0, split="held")
    with pytest.raises(ValueError, match=f"held_out = {held_out} .* less than the 103"):
        numbered(held_out=held_out)


X, Y = torch.zeros(4, 1, 2, 2), torch.arange(4)
RAGGED, WORDS = [[1.0], [1.0, 2.0], [], [3.0]], np.array(["a", "b", "c", "d"])
NAN, HUGE = X.clone(), X.double()
NAN[2, 0, 1, 1], HUGE[3] = torch.nan, 1e300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (X, Y[:3], X, Y),
            r"targets = 'train' .* its 4 inputs needs one, .* shape is \(3,\)",
        ),
        ((X, torch.tensor(1), X, Y), r"each of its 4 inputs needs one, .* shape is \(\)"),
        ((X, Y, X[:0], Y[:0]), r"inputs = 'test' .*\(N, ...\), .* not \(0, 1, 2, 2\)"),
        ((X[..., :0], Y, X, Y), r"without a 0, not \(4, 1, 2, 0\)"),
        ((X[:, 0, 0, 0], Y, X, Y), r"must be \(N, ...\).* not \(4,\)"),
        ((torch.tensor(1.0), Y, X, Y), r"must be \(N, ...\).* not \(\)"),
        ((X, Y.float(), X, Y), "must be integers .*, not torch.float32 from 0"),
        ((X, Y > 1, X, Y), "must be integers .*, not torch.bool"),
        ((X, Y - 1, X, Y), "must be integers 0, 1, .* not torch.int64 from -1 to 2"),
        ((X, Y * 10**6, X, Y), "below a million, not torch.int64 from 0 to 3000000"),
        ((X, np.array([1, 2**64 - 1, 0, 0], np.uint64), X, Y), "not torch.uint64 from -1"),
        ((X, torch.zeros_like(Y), X, Y), r"labels = \[0\] .* two classes or more"),
        ((X, Y + Y[3] - Y, X, Y), r"labels = \[3\] .* two classes or more"),
        ((X > 0, Y, X > 0, Y), "dense and real, not torch.strided of torch.bool"),
        ((X + 1j, Y, X, Y), "dense and real, not torch.strided of torch.complex64"),
        ((X.to_sparse(), Y, X, Y), "dense and .*, not torch.sparse_coo of torch.float32"),
        ((X, Y, X[:, :, :1], Y), "must have one shape"),
        ((X.byte(), Y, X, Y), "both be uint8 or floating-point"),
        ((X.byte()[:, 0], Y, X, Y), r"uint8 images \(N, C, H, W\), .* not \(4, 2, 2\)"),
        ((NAN, Y, X, Y), r"'train' .* NaN or infinity in 1 of them, .* number \[2\]"),
        ((X, Y, 1 / X, Y), r"'test' .* NaN or infinity in 4 of them, .* number \[0\]"),
        ((HUGE, Y, X, Y), r"NaN or infinity in 1 of them, .* number \[3\]"),
        ((None, Y, X, Y), "must be tensors or arrays: .*NoneType"),
        ((RAGGED, Y, X, Y), "must be tensors or arrays: "),
        ((X, WORDS, X, Y), "must be tensors or arrays: .*numpy.str_"),
        ((X, {"a": 1}, X, Y), "must be tensors or arrays: .*dict"),
        ((X.numpy()[:, :, ::-1], Y, X, Y), "must be tensors or arrays: .*stride"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message) as caught:
        data.from_tensors(*arguments)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


LONG = "x" * 51
UNSAFE = ["", ".", "..", "../../x", "/abs", "a/b", "a\\b", "a\nb", "a\n", "a\0b", " a", "~", LONG]
UNSAFE += ["$HOME", "a;b", "a'b", 'a"b', "<b>", "a|b", "-a", "\udcff", "*", "{x}", "a`b`"]


@pytest.mark.parametrize("name", UNSAFE)
def test_a_name_that_cannot_begin_that_of_a_folder_is_refused(name):
    with pytest.raises(ConfigError, match="name of a dataset = .* at most 50 letters"):
        numbered(name=name)


@given(st.text(max_size=60))
def test_a_name_is_refused_or_names_a_file_in_its_folder(name):
    try:
        name = numbered(name=name).name
    except ConfigError:
        return
    assert os.path.basename(os.path.normpath(f"/runs/{name}")) == name
    assert name.isprintable() and len(os.fsencode(name)) <= 200


@pytest.mark.parametrize("name", ["mine", "My data", "été_2", "a.b-c+d", "x" * 50, "7"])
def test_usual_names_are_as_given(name):
    assert numbered(name=name).name == name


def test_a_history_of_gradients_stays_behind():
    x = X.clone().requires_grad_()
    assert not data.from_tensors(2 * x, Y, X, Y, device="cpu").batch(0, 2, 0)[0].requires_grad


@pytest.mark.parametrize("held_out", ["3", None, 2.5, -1, 4, 10**9])
def test_held_out_is_a_number_of_images(held_out):
    with pytest.raises(ConfigError, match="held_out = .* at least 0 and less than the 4"):
        data.from_tensors(X, Y, X, Y, held_out=held_out)
    assert data.from_tensors(X, Y, X, Y, held_out=np.int64(1)).sizes["held"] == 1


@pytest.mark.parametrize("seed", [-1, 0.5, "0", None])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match="seed = .* an integer >= 0"):
        data.from_tensors(X, Y, X, Y, seed=seed)


def test_unknown_names_and_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'mnist' .*digits, cifar10"):
        data.load("mnist", tmp_path)
    with pytest.raises(ConfigError, match="'image_size': 32.* digits takes none"):
        data.load("digits", tmp_path, image_size=32)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagefolder"])
def test_a_root_that_cannot_be_used_is_named(tmp_path, name):
    (root := tmp_path / "file").write_text("")
    with pytest.raises(data.DataError, match=f"{root}"):
        data.load(name, root, image_size=8 if name == "imagefolder" else None)
