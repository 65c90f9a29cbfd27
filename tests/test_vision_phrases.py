"""Boxes and masks of what phrases mean (#37): scenes, targets, head and words against what is written out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.core.pictures import letterbox
from manyheads.vision.finding.detr import to_corners
from manyheads.vision.finding.grounding import (
    TRAINING,
    Grounder,
    GroundingMaps,
    boxes_at,
    centre_focal,
    centre_targets,
    dice,
    from_windows,
    gaussian_radius,
    load_grounder,
    save_grounder,
    to_windows,
    train_grounder,
)
from manyheads.vision.finding.grounding_claims import box_hits, heads_that_read, mask_iou
from manyheads.vision.finding.phrased_scenes import COLOURS, phrased_digits, phrased_shapes, unambiguous_phrases
from manyheads.vision.finding.phrases import UNKNOWN, Phrased, Vocabulary, words_of
from manyheads.vision.finding.seeing_phrases import look_for

SHAPES = phrased_shapes(24, 0)


def test_a_phrase_of_a_place_is_made_only_where_it_means_one_thing():
    kinds = [("red square", "square"), ("red square", "square"), ("blue circle", "circle")]
    named, placed = unambiguous_phrases(kinds, torch.tensor([[10.0, 10.0], [50.0, 12.0], [30.0, 40.0]]))
    assert named == [("the blue circle", 2), ("the circle", 2)]
    wanted = {
        (f"the {name} {side} the {other}", thing)
        for name in ("square", "red square")
        for other in ("circle", "blue circle")
        for side, thing in (("left of", 0), ("right of", 1))
    }  # both squares are above the circle
    assert set(placed) == wanted
    # a middle within 4 pixels of the circle's is on neither side
    assert unambiguous_phrases(kinds, torch.tensor([[10.0, 40.0], [33.0, 40.0], [30.0, 40.0]]))[1] == []


def test_masks_have_the_colour_and_the_box_that_the_phrase_says_and_digits_of_the_parts_differ():
    tints = torch.tensor(list(COLOURS.values()))
    for i, phrase in enumerate(SHAPES.phrases):
        mask, words = SHAPES.masks[i], phrase.split()
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        around = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert torch.equal(around.float(), SHAPES.boxes[i])
        if words[1] in COLOURS:
            seen = SHAPES.pixels[SHAPES.scene[i]][:, mask].mean(1)
            assert list(COLOURS)[int((tints - seen).norm(dim=1).argmin())] == words[1]
    assert sum(len(phrase.split()) > 4 for phrase in SHAPES.phrases) > 24 / 2
    digits = phrased_digits(4, 0, "test")
    assert torch.equal(digits.pixels, phrased_digits(4, 0, "test").pixels)
    assert not torch.equal(digits.pixels, phrased_digits(4, 0, "train").pixels)
    shuffled = SHAPES.shuffled()
    assert sorted(shuffled.phrases) == sorted(SHAPES.phrases) and torch.equal(shuffled.boxes, SHAPES.boxes)
    assert sum(a != b for a, b in zip(shuffled.phrases, SHAPES.phrases, strict=True)) > len(SHAPES.phrases) / 2


def test_what_is_no_phrase_or_mask_is_refused_and_words_are_those_of_the_alphabet():
    assert words_of("The Red_square, left-of the girl's!") == ["the", "red", "square", "left", "of", "the", "girl's"]
    vocabulary = Vocabulary.of(["the red one", "a blue one"])
    assert vocabulary.words == ("a", "blue", "one", "red", "the")
    assert vocabulary.numbers(["RED dog", "the one the"]).tolist() == [[5, UNKNOWN, 0], [6, 4, 6]]
    assert vocabulary.unknown("red dog") == ["dog"]
    with pytest.raises(InputError, match="0 words"):
        replace(SHAPES, phrases=("?",) * len(SHAPES.phrases))
    with pytest.raises(InputError, match="a mask is empty"):
        replace(SHAPES, masks=torch.zeros_like(SHAPES.masks))
    with pytest.raises(InputError, match="phrases and masks"):
        replace(SHAPES, phrases=SHAPES.phrases[1:])
    with pytest.raises(InputError, match="sides that 32 divides"):
        Grounder(["a"])(torch.rand(1, 3, 40, 40), torch.ones(1, 1).long())
    with pytest.raises(InputError, match="read_at is"):
        train_grounder(SHAPES, read_at="middle")


def test_centre_targets_are_a_gaussian_around_the_rounded_middle_with_centernets_radius():
    box = torch.tensor([[0.1, 0.2, 0.72, 0.9]])
    wide, cell = centre_targets(box, 10)
    radius = float(gaussian_radius(torch.tensor([7.0]), torch.tensor([6.2])))
    sigma = (2 * math.floor(radius) + 1) / 6
    assert int(cell) == 6 * 10 + 4 and float(wide[0, 6, 4]) == 1  # the middle is (4.1, 5.5); .5 is rounded to even
    assert float(wide[0, 7, 6]) == pytest.approx(math.exp(-(1 + 4) / (2 * sigma**2)))
    # the derived radius, 1 / 2.8 of the released one, moves all corners outwards until the IoU is .7
    h, w = 12.0, 7.0
    r = float(gaussian_radius(torch.tensor([h]), torch.tensor([w]))) / 2.8
    assert h * w / ((h + 2 * r) * (w + 2 * r)) == pytest.approx(0.7, abs=1e-5)


def test_the_head_can_say_each_true_box_exactly_and_offsets_may_be_negative():
    shares = SHAPES.boxes / 64
    _, cell = centre_targets(shares, 8)
    middle, sides = (shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]
    offset = middle * 8 - torch.stack([cell % 8, cell // 8], -1)
    assert float(offset.min()) < 0
    many = len(cell)
    offsets, sizes = torch.full((2, many, 2, 64), 7.0)
    offsets[torch.arange(many), :, cell], sizes[torch.arange(many), :, cell] = offset, sides
    found = to_corners(boxes_at(offsets.unflatten(2, (8, 8)), sizes.unflatten(2, (8, 8)), cell))
    assert torch.allclose(found, shares, atol=1e-6)


def test_losses_are_those_done_by_hand_and_the_released_double_sigmoid_is_another():
    found, wanted = torch.tensor([[[0.8, 0.3]]]), torch.tensor([[[1.0, 0.5]]])
    by_hand = -(0.2**2 * math.log(0.8) + 0.5**4 * 0.3**2 * math.log(0.7))
    assert float(centre_focal(found, wanted)) == pytest.approx(by_hand, rel=1e-5)
    assert float(dice(found, torch.tensor([[[1.0, 0.0]]]))) == pytest.approx(1 - 2.6 / 3.1)
    model = Grounder(["a"], width=32, depth=2)
    given = {
        "pixels": SHAPES.pixels[:1],
        "words": torch.tensor([[2]]),
        "boxes": SHAPES.boxes[:1],
        "masks": SHAPES.masks[:1],
    }
    shown = model(given["pixels"], given["words"])[1].sigmoid()
    p, m = shown.sigmoid(), given["masks"].float()
    twice = torch.where(m == 1, 0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()).mean()
    once = torch.where(m == 1, 0.25 * (1 - shown) ** 2 * -shown.log(), 0.75 * shown**2 * -(1 - shown).log()).mean()
    gap = model.loss(**given, double_sigmoid=True) - model.loss(**given)
    assert float(gap.detach()) == pytest.approx(float((twice - once).detach()), abs=1e-5)


def test_windows_hold_their_own_cells_and_only_blocks_over_everything_read_the_words():
    grid = torch.arange(64.0).view(1, 64, 1).expand(2, -1, 3)
    windows = to_windows(grid, 4)
    assert windows.shape == (8, 16, 3)
    assert windows[1, :, 0].view(4, 4).tolist() == [[8 * r + c for c in range(4, 8)] for r in range(4)]
    assert torch.equal(from_windows(windows, 2, 4), grid)
    model = Grounder(["a", "b"], width=32, depth=2)
    x, text, none = torch.randn(1, 64, 32), torch.randn(1, 2, 32), torch.zeros(1, 2, dtype=torch.bool)
    other, changed = x.clone(), x.clone()
    changed[0, 63] += torch.randn(32)
    for block, everywhere in zip(model.blocks, (False, True), strict=True):
        reads = not torch.allclose(block(x, text, none), block(other, 2 * text, none))
        far = not torch.allclose(block(x, text, none)[0, 0], block(changed, text, none)[0, 0])
        assert reads == far == everywhere


def test_sharing_saves_the_parameters_of_one_convolution_and_joins_the_two_answers():
    def size(shared: bool) -> int:
        return sum(p.numel() for p in GroundingMaps(64, shared=shared).parameters())

    assert size(False) - size(True) == 32 * 32 * 9 + 32 + 2 * 32
    for shared in (True, False):
        maps = GroundingMaps(64, shared=shared)
        maps(torch.randn(1, 64, 8, 8))[1].sum().backward()  # the mask alone
        assert (maps.first[0][0].weight.grad is not None) == shared


def test_phrases_learned_by_heart_are_found_by_their_words_and_the_same_after_saving(tmp_path):
    kept = SHAPES.take(torch.arange(8))
    start = Grounder(Vocabulary.of(SHAPES.phrases).words, width=32, depth=2, seed=0)
    settings = replace(TRAINING, steps=90, rows=8, warmup=10, rate=4e-3)
    model = train_grounder(kept, settings, model=start)
    found = model.find(kept.pixels, kept.phrases)
    assert float(box_hits(found, kept).mean()) >= 0.75 and float(mask_iou(found, kept).mean()) > 0.5
    overlap = [float(box_iou(a[None], b[None])) for a, b in zip(found.boxes, kept.boxes, strict=True)]
    assert [float(hit) for hit in box_hits(found, kept)] == [float(one >= 0.5) for one in overlap]
    other = kept.shuffled(1)
    assert box_hits(model.find(other.pixels, other.phrases), other).mean() < box_hits(found, kept).mean()
    words = model.vocabulary.numbers(kept.phrases[:1])
    filled = model(kept.pixels[:1], F.pad(words, (0, 3)))  # what fills up changes nothing
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(model(kept.pixels[:1], words), filled, strict=True))
    lost = heads_that_read(model, kept)
    assert len(lost) == 3 * 4 and "block 1, head 0" in lost and "decoder 1, head 3" in lost
    save_grounder(model, tmp_path / "phrases", {})
    again, card = load_grounder(tmp_path / "phrases")
    assert again.vocabulary.words == model.vocabulary.words and card.method == "PLVL"
    assert torch.equal(again.find(kept.pixels, kept.phrases).boxes, found.boxes)


def test_users_give_pictures_phrases_boxes_and_masks():
    pixels, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, 4:12, 6:20] = True
    own = Phrased(pixels, torch.tensor([0]), ("the dog on the left",), torch.tensor([[6.0, 4.0, 20.0, 12.0]]), mask)
    model = train_grounder(own, replace(TRAINING, steps=2), model=Grounder(["dog"], width=32, depth=2))
    assert model.find(pixels, ["a cat"]).masks.shape == (1, 32, 32)


def test_a_box_in_a_picture_of_another_size_is_where_the_square_had_it():
    model = Grounder(["red", "square"], width=32, depth=2, seed=3)
    wide = SHAPES.pixels[0][:, 16:48].permute(1, 2, 0).double().numpy()  # 32 x 64: grey above and below in the square
    wide = wide.repeat(3, 0).repeat(3, 1)
    seen = look_for(model, wide, "the red square")
    square = letterbox(wide, 64)
    inside = model.find(square.pixels[None], ["the red square"]).boxes.view(2, 2).numpy()
    wanted = ((inside - [0, 16]) * 3).clip(0, [192, 96])
    assert seen.rows[0]["box"] == pytest.approx(wanted.flatten().tolist(), abs=0.06)
    assert seen.drawn.shape == (96, 192, 3) and seen.notes == ("It never read the.",)
    with pytest.raises(InputError, match="none of the words"):
        look_for(model, wide, "my dog")
    with pytest.raises(InputError, match="multiple of 32"):
        look_for(model, wide, "red", side=50)
