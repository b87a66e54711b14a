"""Any torchvision CNN as the encoder: where it is cut, what is trained, whose weights it takes."""

import dataclasses
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor
from torchvision.models import MobileNet_V2_Weights, get_model, list_models

from captioning import Captioner
from captioning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, EncoderConfig
from captioning.losses import word_nll
from captioning.models.captioner import CaptioningModel, build_model
from captioning.models.encoder import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_encoder,
    find_layer,
    read_weights,
    spatial_nodes,
)
from captioning.vocabulary import SPECIAL, START, Vocabulary

RESNETS = list_models(module=torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])

# The last stage of each network, and what is trained with it because it comes after it.
LAST_STAGE = {
    "vgg16": "features.28",
    "vgg19": "features.34",
    "resnet18": "layer4",
    "resnet50": "layer4",
    "resnet101": "layer4",
    "mobilenet_v2": "features.18",
    "densenet121": "features.denseblock4",
    "efficientnet_b0": "features.8",
    "convnext_tiny": "features.7",
}
AFTER = {"densenet121": "features.norm5"}
VOCABULARY = Vocabulary([*SPECIAL, "a", "red", "circle", "left", "of", "two"])
DECODER = DecoderConfig(embedding_dim=8, hidden_dim=8, attention_dim=8, dropout=0.0)


def small(name: str = "resnet18", **settings: object) -> EncoderConfig:
    """A random network on 64 pixels, cut early where that is possible."""
    values = {"weights": None, "image_size": 64, **({"layer": "layer1"} if name == "resnet18" else {}), **settings}
    return EncoderConfig(name, **values)  # type: ignore[arg-type]


def images(count: int = 2, *, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randint(
        0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def train_one_step(model: CaptioningModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The encoder's state before and after one step of Adam."""
    before = {name: x.clone() for name, x in model.encoder.network.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    output = model.train()(images(), torch.tensor([[[START, 4, 5, 6, 2]], [[START, 9, 5, 6, 2]]]))
    word_nll(output.logits, output.targets).mean().backward()
    optimizer.step()
    return before, dict(model.encoder.network.state_dict())


@pytest.mark.parametrize("name", ["vgg16", "vgg19"])
def test_vgg_gives_the_grid_of_the_paper_by_default(name):
    node = find_layer(EncoderConfig(name))
    assert (node.height, node.width, node.channels) == (14, 14, 512)


@pytest.mark.parametrize("name", [*RESNETS, "mobilenet_v2"])
def test_resnets_and_mobilenet_have_both_grids(name):
    assert find_layer(EncoderConfig(name)) == find_layer(EncoderConfig(name, grid=7))
    coarse, fine = (find_layer(EncoderConfig(name, grid=grid)) for grid in (7, 14))
    assert (coarse.height, coarse.width, fine.height, fine.width) == (7, 7, 14, 14)


@pytest.mark.parametrize(
    ("name", "grid", "layer", "channels"),
    [
        ("resnet50", 7, "layer4.2.relu_2", 2048),
        ("resnet50", 14, "layer3.5.relu_2", 1024),
        ("mobilenet_v2", 7, "features.18", 1280),
        ("mobilenet_v2", 14, "features.14.conv.0", 576),
        ("vgg19", 14, "features.35", 512),
    ],
)
def test_a_grid_is_cut_after_the_last_activation_that_has_it(name, grid, layer, channels):
    node = find_layer(EncoderConfig(name, grid=grid))
    assert (node.name, node.channels) == (layer, channels)


@pytest.mark.parametrize("name", ["densenet121", "efficientnet_b0", "convnext_tiny"])
def test_a_network_without_an_entry_is_cut_at_its_last_feature_map(name):
    node = find_layer(EncoderConfig(name))
    assert (node.height, node.width) == (7, 7)


def test_pixels_are_normalised_as_torchvisions_weights_want_them():
    theirs = MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    assert tuple(theirs.mean) == IMAGENET_MEAN
    assert tuple(theirs.std) == IMAGENET_STD


@pytest.mark.parametrize(
    ("name", "weights"), [("vgg16", "IMAGENET1K_FEATURES"), ("efficientnet_v2_l", "IMAGENET1K_V1")]
)
def test_weights_that_want_other_pixels_are_refused_before_they_are_fetched(name, weights):
    with pytest.raises(
        ValueError, match=rf"encoder.weights='{weights}': they want pixels normalised by mean"
    ) as caught:
        read_weights(name, weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_googles_networks_get_the_pixels_that_their_weights_want(name, tmp_path):
    # Those were trained on pixels from -1 to 1, and torchvision's networks make these of ImageNet's statistics.
    torch.manual_seed(0)
    whole = get_model(name, weights=None, transform_input=True, init_weights=True).eval()
    torch.save(whole.state_dict(), tmp_path / "whole.pth")  # with the classifiers at its side, as torchvision's file
    config = EncoderConfig(name=name, weights=str(tmp_path / "whole.pth"), image_size=96)
    encoder, _ = build_encoder(config)
    seen = []
    first = "conv1" if name == "googlenet" else "Conv2d_1a_3x3"
    for network in (encoder.network, whole):
        network.get_submodule(first).conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pictures = images(size=96)
    with torch.no_grad():
        encoder(pictures)
        whole((pictures / 255 - encoder.mean) / encoder.std)
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(seen[0], pictures / 127.5 - 1, rtol=0, atol=1e-5)


def test_a_stage_before_the_first_that_is_trained_stays_as_it_was():
    encoder, _ = build_encoder(small(train_from="layer1", batch_norm="train"))
    statistics = {name: x.clone() for name, x in encoder.network.state_dict().items() if "running" in name}
    encoder.train()(images())
    moved = {name for name, x in encoder.network.state_dict().items() if not torch.equal(statistics.get(name, x), x)}
    assert moved
    assert all(name.startswith("layer1.") for name in moved)


def test_a_picture_without_a_map_is_refused():
    with pytest.raises(
        ValueError, match=r"efficientnet_b0 has no feature map larger than 1x1 at encoder\.image_size=2"
    ):
        find_layer(EncoderConfig(name="efficientnet_b0", image_size=2))


@pytest.mark.parametrize("content", [b"error code: 1015", b"hello", b"<html></html>", b"\x80\x02", b"", b"c", b"J\x00"])
def test_whatever_came_in_place_of_a_weights_file_is_named(content, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth: not a state dict") as caught:
        read_weights("resnet18", str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)


def test_annotation_vectors_are_the_feature_map_row_by_row():
    encoder, config = build_encoder(small())
    network = get_model("resnet18", weights=None).eval()
    network.load_state_dict({**network.state_dict(), **encoder.network.state_dict()})
    x = (images() / 255 - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    x = network.layer1(network.maxpool(network.relu(network.bn1(network.conv1(x)))))
    a = encoder(images())
    assert (encoder.grid, encoder.dim, a.shape) == ((16, 16), 64, (2, 256, 64))
    assert (config.layer, config.grid) == ("layer1.1.relu_1", 16)
    torch.testing.assert_close(a[:, 3 * 16 + 5], x[:, :, 3, 5])
    torch.testing.assert_close(a[:, 15 * 16 + 0], x[:, :, 15, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_STAGE)
def test_every_network_trains_frozen_and_fine_tuned_and_captions_the_same_after_loading(name, tmp_path):
    torch.manual_seed(0)
    model, config = build_model(small(name, layer=None), DECODER, len(VOCABULARY))
    decoder_before = {key: x.clone() for key, x in model.decoder.state_dict().items()}
    before, after = train_one_step(model)  # frozen: also the running statistics stay
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.encoder.parameters())
    assert any(not torch.equal(decoder_before[key], x) for key, x in model.decoder.state_dict().items())

    stage = LAST_STAGE[name]
    tuned = dataclasses.replace(config, train_from=stage, batch_norm="train")  # as networks from scratch need it
    model, config = build_model(tuned, DECODER, len(VOCABULARY), encoder_state=after)
    before, after = train_one_step(model)
    names = [key for key, _ in model.encoder.network.named_parameters()]
    changed = {key for key in names if not torch.equal(before[key], after[key])}
    trained = (f"{stage}.", f"{AFTER.get(name, stage)}.")
    assert any(key.startswith(f"{stage}.") for key in changed)
    assert [key for key in changed if not key.startswith(trained)] == []

    checkpoint = Checkpoint(model.eval(), config, DECODER, VOCABULARY)
    photos = list(images(3, seed=1).permute(0, 2, 3, 1).numpy())
    captions = Captioner(checkpoint).caption(photos, beam_size=2, max_length=5)
    save_checkpoint(tmp_path / "x", checkpoint)
    loaded = Captioner(load_checkpoint(tmp_path / "x")).caption(photos, beam_size=2, max_length=5)
    assert [(c.words, c.log_probs) for c in loaded] == [(c.words, c.log_probs) for c in captions]


def test_all_trains_every_layer():
    encoder, _ = build_encoder(small(train_from="all"))
    assert all(p.requires_grad for p in encoder.parameters())


def test_a_stage_trains_itself_and_what_follows():
    encoder, _ = build_encoder(small(layer="layer2", train_from="layer1.1"))
    trained = {name.split(".")[0] for name, p in encoder.network.named_parameters() if p.requires_grad}
    frozen = {name for name, p in encoder.network.named_parameters() if not p.requires_grad}
    assert trained == {"layer1", "layer2"}
    assert {".".join(name.split(".")[:2]) for name in frozen} == {"conv1.weight", "bn1.weight", "bn1.bias", "layer1.0"}


@pytest.mark.parametrize(
    ("batch_norm", "train_from", "moves"), [("frozen", "all", False), ("train", "all", True), ("train", None, False)]
)
def test_running_statistics_move_only_in_a_trained_network_that_asks_for_it(batch_norm, train_from, moves):
    encoder, _ = build_encoder(small(batch_norm=batch_norm, train_from=train_from))
    before = {name: x.clone() for name, x in encoder.named_buffers()}
    encoder.train()(images())
    assert all(torch.equal(before[name], x) for name, x in encoder.named_buffers()) == (not moves)


def test_evaluation_mode_moves_no_statistics():
    encoder, _ = build_encoder(small(batch_norm="train", train_from="all"))
    before = {name: x.clone() for name, x in encoder.named_buffers()}
    encoder.eval()(images())
    assert all(torch.equal(before[name], x) for name, x in encoder.named_buffers())


def test_an_image_has_the_same_vectors_whatever_its_neighbours():
    encoder, _ = build_encoder(small())
    torch.testing.assert_close(encoder(images(3))[1:2], encoder(images(3)[1:2]))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "resnet19"}, r"encoder\.name='resnet19' is no torchvision classification model"),
        (
            {"layer": "layer9"},
            r"encoder\.layer='layer9' is no feature map of resnet18; allowed: .*layer4\.1 \(2x2x512\)",
        ),
        ({"layer": "layer4", "grid": 4}, r"encoder\.layer='layer4'"),
        ({"layer": None, "grid": 5}, r"encoder\.grid=5 is no grid of resnet18; allowed: \[2, 4, 8, 16, 32\]"),
        ({"train_from": "layer9"}, r"encoder\.train_from='layer9' is no stage .*allowed: all, conv1, bn1, layer1, "),
        ({"train_from": "layer"}, r"encoder\.train_from='layer' is no stage"),
        ({"weights": "IMAGENET"}, r"encoder\.weights='IMAGENET': allowed: IMAGENET1K_V1, DEFAULT, null, a \.pth"),
    ],
)
def test_a_wrong_setting_lists_what_is_allowed(settings, named):
    config = dataclasses.replace(small(), **settings)
    with pytest.raises(ValueError, match=named) as error:
        build_encoder(config)
    assert "\n" not in str(error.value)


def test_every_stage_that_an_error_lists_is_accepted():
    with pytest.raises(ValueError, match="allowed: all, ") as error:
        build_encoder(small(train_from="nothing"))
    for stage in str(error.value).split("allowed: ")[1].split(", "):
        build_encoder(small(train_from=stage))


def test_without_a_network_the_error_says_what_to_do(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(MobileNet_V2_Weights, "get_state_dict", fail)
    with pytest.raises(
        ConnectionError, match=r"weights=DEFAULT: .*download https://.*mobilenet_v2.*pass its path"
    ) as error:
        build_encoder(EncoderConfig("mobilenet_v2"))
    assert "\n" not in str(error.value)


class Evil:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value))])
def test_code_in_a_weights_file_is_never_run(write, tmp_path):
    write({"conv1.weight": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: not a state dict") as error:
        build_encoder(small(weights=str(tmp_path / "evil.pth")))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("value", [{"epoch": 3}, [torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}])
def test_a_file_that_holds_more_than_tensors_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: not a state dict"):
        read_weights("resnet18", str(tmp_path / "x.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_broken_or_missing_weights_file_is_named(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    with pytest.raises(FileNotFoundError, match=rf"x{suffix}: no such file"):
        read_weights("resnet18", str(path))
    for content in (b"", b"no tensors", b"PK\x03\x04 no archive"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"x{suffix}: not a state dict"):
            read_weights("resnet18", str(path))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_weights_file_of_the_whole_network_is_taken(suffix, tmp_path):
    torch.manual_seed(3)
    state = get_model("resnet18", weights=None).state_dict()
    path = tmp_path / f"x{suffix}"
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state, path)
    encoder, _ = build_encoder(small(weights=str(path)))
    assert all(torch.equal(x, state[name]) for name, x in encoder.network.state_dict().items())


def test_weights_of_another_network_do_not_fit(tmp_path):
    torch.save(get_model("resnet34", weights=None).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth: does not fit the network: .*layer1\.2") as error:
        build_encoder(small(weights=str(tmp_path / "x.pth")))
    assert "\n" not in str(error.value)


@pytest.mark.data
def test_the_trained_mobilenet_gives_annotation_vectors(shared):
    path = shared("weights", "mobilenet_v2_imagenet.pth")
    encoder, config = build_encoder(EncoderConfig("mobilenet_v2", weights=str(path)))
    assert (config.layer, encoder.grid, encoder.dim) == ("features.18", (7, 7), 1280)
    a = encoder(images(1, size=224))
    assert a.shape == (1, 49, 1280)
    assert 0 <= a.min() < a.max() <= 6  # its last activation is ReLU6
    stored = torch.load(path, weights_only=True)
    assert all(torch.equal(x, stored[name]) for name, x in encoder.network.state_dict().items())


def test_maps_whose_channels_come_last_are_no_feature_maps():
    nodes = spatial_nodes("swin_t", 224)
    assert nodes
    assert all(node.height == node.width for node in nodes)
    with pytest.raises(ValueError, match=r"grid=14 is no grid of swin_t; allowed: \[7, 56\]"):
        build_encoder(EncoderConfig("swin_t", grid=14, weights=None))


@pytest.mark.parametrize(("name", "size"), [("vit_b_16", 320), ("inception_v3", 64)])
def test_a_network_that_takes_no_pictures_of_a_size_says_so(name, size):
    with pytest.raises(ValueError, match=rf"encoder\.name='{name}' takes no pictures of encoder\.image_size={size}"):
        build_encoder(EncoderConfig(name, weights=None, image_size=size))
