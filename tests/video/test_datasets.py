"""Annotations as published, with their quirks, and what becomes of them."""

import json
import shutil

import pytest

from modicum.errors import UsageError
from modicum.video.datasets import FORMATS, VideoDataset, VideoSample, read_dataset, read_labels, write_labels
from tests.video.clips import numbers_of, picture, write_image, write_video


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", 12)


@pytest.fixture
def place(clip, tmp_path):
    """Puts a video at a path below the test's folder."""

    def put(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clip, path)

    return put


def taken(dataset):
    """(path below the root, targets) of each sample."""
    return [(sample.path.name, sample.targets) for sample in dataset.samples]


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
"air drumming",-x_Ab1,3,13,train,0
tai chi,__b c,20,30,train,1
tai chi,--NoT_here,7,17,train,0
massaging person's head,Aaa,1,11,validate,0
air drumming,aaa,1,11,train,0
air drumming,aaa,1,11,train,0
tai chi,aaa,1,11,train,0
"""


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_kinetics(tmp_path, place, mark, ending):
    (tmp_path / "k.csv").write_bytes((mark + KINETICS.replace("\n", ending)).encode())
    place("v/train/air drumming/-x_Ab1_000003_000013.mp4", "v/__b c_000020_000030.MKV", "v/aaa_000001_000011.webm")
    place("v/Aaa_000001_000011.mp4", "v/--NoT_here_000007_000017.mp4.part")
    dataset = read_dataset("kinetics", tmp_path / "k.csv", tmp_path / "v", split="train")
    assert dataset.labels == ["air drumming", "tai chi"]
    assert dataset.heads == {"": 2}
    assert taken(dataset) == [
        ("-x_Ab1_000003_000013.mp4", (0,)),
        ("__b c_000020_000030.MKV", (1,)),
        ("aaa_000001_000011.webm", (0,)),
        ("aaa_000001_000011.webm", (1,)),
    ]
    assert dataset.missing == [
        ("--NoT_here_000007_000017", f"no video --NoT_here_000007_000017 below {tmp_path / 'v'}"),
        ("aaa_000001_000011", "is listed twice, and taken once"),
    ]
    assert dataset.samples[0].id == "-x_Ab1_000003_000013"
    assert (dataset.samples[0].start, dataset.samples[0].end) == (None, None)
    more = [*dataset.labels, "massaging person's head"]
    val = read_dataset("kinetics", tmp_path / "k.csv", tmp_path / "v", split="val", labels=more)
    assert taken(val) == [("Aaa_000001_000011.mp4", (2,))]
    with pytest.raises(UsageError, match=r'has the label "massaging person\'s head", which is none of the 2 given'):
        read_dataset("kinetics", tmp_path / "k.csv", tmp_path / "v", split="val", labels=dataset.labels)
    with pytest.raises(UsageError, match="has nothing of the split 'test': choose one of train, validate"):
        read_dataset("kinetics", tmp_path / "k.csv", tmp_path / "v", split="test")


def test_kinetics_files_in_folders_of_split_and_label_or_uncut(tmp_path, place):
    rows = "tai chi,a-b,2,12,train\nsailing,a-b,2,12,val\nsailing,whole_1,1,11,train\n"
    (tmp_path / "no header.csv").write_text(rows)
    place("train/tai_chi/a-b_000002_000012.mp4", "val/sailing/a-b_000002_000012.mp4", "whole_1.mp4")
    dataset = read_dataset("kinetics", tmp_path / "no header.csv")
    folders = [sample.path.parent.relative_to(tmp_path).as_posix() for sample in dataset.samples]
    assert folders == ["train/tai_chi", "val/sailing", "."]
    assert [(sample.start, sample.end) for sample in dataset.samples] == [(None, None), (None, None), (1, 11)]


def test_kinetics_without_labels_or_videos(tmp_path, place):
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\nabc,1,11,test\n")
    with pytest.raises(UsageError, match="has no labels, as published for test sets"):
        read_dataset("kinetics", tmp_path / "test.csv")
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end,split\ntai chi,abc,1,11,test\n")
    with pytest.raises(
        UsageError, match=r"has no videos here; of 1 that are listed the first is \('abc_000001_000011', "
    ):
        read_dataset("kinetics", tmp_path / "k.csv")
    (tmp_path / "k.csv").write_text("label,youtube_id,time_start,time_end,split\ntai chi,abc,,11,test\n")
    with pytest.raises(UsageError, match="k.csv has a row without time_start: 'tai chi,abc,,11,test'; columns label,"):
        read_dataset("kinetics", tmp_path / "k.csv")


def test_moments(tmp_path, place):
    (tmp_path / "trainingSet.csv").write_text(
        'clapping/flickr-0-6-9_1.mp4,clapping,4,0\n"adult+female+singing/yt-a, b.mp4",adult+female+singing,3,1\n'
        "clapping/gone.mp4,clapping,3,0\nboarding/flickr-0-6-9_1.mp4,boarding,5,0\n"
    )
    (tmp_path / "moments_categories.txt").write_text("boarding,2\nadult+female+singing,1\nclapping,0\nunused,3\n")
    place("training/clapping/flickr-0-6-9_1.mp4", "validation/clapping/flickr-0-6-9_1.mp4")
    place("training/adult+female+singing/yt-a, b.mp4", "training/boarding/flickr-0-6-9_1.mp4")
    for split in ("train", None):
        dataset = read_dataset(
            "moments", tmp_path / "trainingSet.csv", split=split, labels=tmp_path / "moments_categories.txt"
        )
        assert dataset.labels == ["clapping", "adult+female+singing", "boarding", "unused"]
        assert [sample.targets for sample in dataset.samples] == [(0,), (1,), (2,)]
        assert [sample.path.relative_to(tmp_path).as_posix() for sample in dataset.samples] == [
            "training/clapping/flickr-0-6-9_1.mp4",
            "training/adult+female+singing/yt-a, b.mp4",
            "training/boarding/flickr-0-6-9_1.mp4",
        ]
        assert dataset.missing == [("clapping/gone.mp4", f"no such video below {tmp_path}")]
    built = read_dataset("moments", tmp_path / "trainingSet.csv")
    assert built.labels == ["adult+female+singing", "boarding", "clapping"]
    inside = read_dataset("moments", tmp_path / "trainingSet.csv", tmp_path / "validation", labels=built.labels)
    assert taken(inside) == [("flickr-0-6-9_1.mp4", (2,)), ("flickr-0-6-9_1.mp4", (1,))]


SOMETHING = [
    {"id": "7", "label": 'holding a "mug"', "template": "Holding [something]", "placeholders": ["a mug"]},
    {
        "id": 12,
        "label": "putting pen, left of cup",
        "template": "Putting [something], left of [something else]",
        "placeholders": [],
    },
    {"id": "404", "label": "holding air", "template": "Holding [something]", "placeholders": ["air"]},
]


def test_something(tmp_path, place):
    (tmp_path / "train.json").write_text(json.dumps(SOMETHING))
    names = {"Putting something, left of something else": "0", "Never seen": "2", "Holding something": "1"}
    (tmp_path / "labels.json").write_text(json.dumps(names))
    place("20bn-something-something-v2/7.webm", "20bn-something-something-v2/12.mp4")
    dataset = read_dataset("something", tmp_path / "train.json", labels=tmp_path / "labels.json")
    assert dataset.labels == ["Putting something, left of something else", "Holding something", "Never seen"]
    assert taken(dataset) == [("7.webm", (1,)), ("12.mp4", (0,))]
    assert [sample.id for sample in dataset.samples] == ["7", "12"]
    assert dataset.samples[0].caption == 'holding a "mug"'
    assert dataset.missing == [("404", f"no video 404 below {tmp_path}")]
    built = read_dataset("something", tmp_path / "train.json")
    assert built.labels == ["Holding something", "Putting something, left of something else"]
    (tmp_path / "test.json").write_text(json.dumps([{"id": "7"}]))
    with pytest.raises(UsageError, match="test.json has no templates, as published for the test set"):
        read_dataset("something", tmp_path / "test.json")
    with pytest.raises(UsageError, match="labels.json is no list of videos with an `id`"):
        read_dataset("something", tmp_path / "labels.json")
    (tmp_path / "test.json").write_text('[{"id": "7"')
    with pytest.raises(UsageError, match="test.json is not json .line 1: .*download it again"):
        read_dataset("something", tmp_path / "test.json")


EPIC_HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame,"
    "narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes\n"
)
EPIC = EPIC_HEADER + (
    "P01_01_0,P01,P01_01,00:00:00.089,00:00:00.04,00:00:00.20,2,12,open door,open,3,door,3,['door'],[3]\n"
    'P01_01_10,P01,P01_01,00:00:01.0,00:00:00.30,01:00:09.5,18,216570,"take, ""that"" cup",take,0,cup,13,'
    "\"['cup', 'lid']\",\"[13, 20]\"\n"
    "P22_107_3,P22,P22_107,00:00:00.1,00:00:00.08,00:00:00.2,4,10,cut,cut,96,onion,299,['onion'],[299]\n"
    "P37_103_70,P37,P37_103,00:00:01.1,00:00:01.00,00:00:02.0,50,100,wash,wash,2,pan,5,['pan'],[5]\n"
)


def test_epic_by_time_in_files_and_by_number_in_folders(tmp_path, place):
    (tmp_path / "EPIC_100_train.csv").write_text(EPIC)
    place("EPIC-KITCHENS/P01/videos/P01_01.MP4")
    frames = tmp_path / "EPIC-KITCHENS/P22/rgb_frames/P22_107"
    frames.mkdir(parents=True)
    for number in range(1, 13):
        write_image(frames / f"frame_{number:010d}.jpg", picture(number))
    (tmp_path / "EPIC-KITCHENS/P37/flow_frames/P37_103").mkdir(parents=True)
    dataset = read_dataset("epic", tmp_path / "EPIC_100_train.csv", split="train")
    assert dataset.heads == {"noun": 300, "verb": 97}
    assert list(dataset.heads) == ["noun", "verb"], "in the order of the model's projection"
    assert [(sample.id, sample.targets) for sample in dataset.samples] == [
        ("P01_01_0", (3, 3)),
        ("P01_01_10", (13, 0)),
        ("P22_107_3", (299, 96)),
    ]
    assert dataset.missing == [("P37_103_70", f"no video or folder P37_103 below {tmp_path}")]
    assert dataset.samples[1].caption == 'take, "that" cup'
    assert [(s.start, s.end) for s in dataset.samples] == [(0.04, 0.2), (0.3, 3609.5), (None, None)]
    last = dataset.samples[2]
    assert (last.path, last.first, last.last, last.rate) == (frames, 4, 9, 50)
    seen = []
    for sample in dataset.samples:
        with sample.opened() as (video, ticks):
            seen.append(numbers_of(video.frames(ticks)))
    # 12 frames at 25 per second: 0.04 to 0.20 s, and from 0.30 s to what there is. Images 4 to 9 at 50 per second: by 25.
    assert seen == [[1, 2, 3, 4], [8, 9, 10, 11], [4, 6, 8]]
    with last.opened(fps=None) as (video, ticks):
        assert numbers_of(video.frames(ticks)) == [4, 5, 6, 7, 8, 9]


def test_epic_class_names(tmp_path, place):
    (tmp_path / "train.csv").write_text(EPIC)
    place("P01/P01_01.mp4")
    plain = read_dataset("epic", tmp_path / "train.csv")
    assert plain.labels[:2] == ["0", "1"]
    classes = tmp_path / "classes"
    classes.mkdir()
    for head, size, name in (("noun", 300, "noun_classes_v2"), ("verb", 97, "verb_classes")):
        rows = [f"{i},{head} {i},\"['a', 'b']\",some" for i in reversed(range(size))]
        (classes / f"EPIC_100_{name}.csv").write_text("id,key,instances,category\n" + "\n".join(rows) + "\n")
    named = read_dataset("epic", tmp_path / "train.csv", labels=classes)
    assert named.labels == [f"noun {i}" for i in range(300)] + [f"verb {i}" for i in range(97)]
    assert (named.labels_of("noun")[299], named.labels_of("verb")[3]) == ("noun 299", "verb 3")
    both = {"noun": named.labels_of("noun"), "verb": classes / "EPIC_100_verb_classes.csv"}
    assert read_dataset("epic", tmp_path / "train.csv", labels=both).labels == named.labels
    assert read_dataset("epic", tmp_path / "train.csv", labels=named.labels).labels == named.labels
    for wrong, reason in (
        (named.labels[1:], "396 labels are given: 300 nouns"),
        ({"noun": ["a"]}, "labels of noun are given"),
    ):
        with pytest.raises(UsageError, match=reason):
            read_dataset("epic", tmp_path / "train.csv", labels=wrong)
    with pytest.raises(UsageError, match="has no head 'action': choose one of 'noun', 'verb'"):
        named.labels_of("action")
    shutil.copytree(classes, tmp_path, dirs_exist_ok=True)
    assert read_dataset("epic", tmp_path / "train.csv").labels == named.labels, "found beside the annotations"
    (tmp_path / "train.csv").write_text(EPIC.replace(",door,3,", ",door,300,"))
    with pytest.raises(UsageError, match="P01_01_0 has the noun 300, of 300"):
        read_dataset("epic", tmp_path / "train.csv")
    (tmp_path / "train.csv").write_text(
        "narration_id,participant_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame\n"
        "P01_01_0,P01,P01_01,00:00:00.04,00:00:00.20,2,12\n"
    )
    with pytest.raises(UsageError, match="has no classes, as published for the test set"):
        read_dataset("epic", tmp_path / "train.csv")


def test_folder_per_class(tmp_path, place):
    place("train/b ox/10.mp4", "train/b ox/9.webm", "train/a_'1'/x y.MP4", "val/b ox/1.mp4", "train/.cache/1.mp4")
    (tmp_path / "train/b ox/notes.txt").write_text("")
    (tmp_path / "train/b ox/.DS_Store").write_text("")
    (tmp_path / "train/empty").mkdir()
    (tmp_path / "train/a_'1'/frames").mkdir()
    write_image(tmp_path / "train/a_'1'/frames/1.png", picture(1))
    dataset = read_dataset("folder", root=tmp_path, split="train")
    assert dataset.labels == ["a_'1'", "b ox", "empty"]
    assert taken(dataset) == [("frames", (0,)), ("x y.MP4", (0,)), ("9.webm", (1,)), ("10.mp4", (1,))]
    assert dataset.samples[1].id == "a_'1'/x y.MP4"
    assert dataset.missing == [("b ox/notes.txt", "neither a video by its suffix nor a folder of images")]
    val = read_dataset("folder", tmp_path / "val", labels=dataset.labels)
    assert taken(val) == [("1.mp4", (1,))]
    with pytest.raises(UsageError, match="held_out is not a folder: give the one that holds the videos"):
        read_dataset("folder", root=tmp_path, split="held_out")
    with pytest.raises(UsageError, match="has no folders: give one that holds a folder of videos for each label"):
        read_dataset("folder", tmp_path / "train/empty")


@pytest.mark.parametrize("numbered", [True, False])
def test_lists_with_all_their_separators(tmp_path, place, numbered):
    place("a.mp4", "b c.webm", "d/e, f.mp4", 'say "g".mp4', "frames/x")
    labels = ["0", "3", "1", "2", "3"] if numbered else ["tai chi", "sailing", "yoga", "sailing", "sailing"]
    lines = [f"a.mp4 {labels[0]}", f"b c.webm\t{labels[1]}", "", f"d/e, f.mp4,{labels[2]}"]
    lines += [f'"say ""g"".mp4" {labels[3]}', f"frames/x   {labels[4]}", f"gone.mp4 {labels[0]}", f"a.mp4 {labels[0]}"]
    (tmp_path / "list.txt").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    dataset = read_dataset("list", tmp_path / "list.txt")
    assert [sample.path.relative_to(tmp_path).as_posix() for sample in dataset.samples] == [
        *("a.mp4", "b c.webm", "d/e, f.mp4", 'say "g".mp4', "frames/x", "a.mp4")
    ]
    if numbered:
        assert dataset.labels == ["0", "1", "2", "3"]
        assert [sample.targets for sample in dataset.samples] == [(0,), (3,), (1,), (2,), (3,), (0,)]
    else:
        assert dataset.labels == ["sailing", "tai chi", "yoga"]
        assert [sample.targets for sample in dataset.samples] == [(1,), (0,), (2,), (0,), (0,), (1,)]
    assert dataset.missing == [("gone.mp4", f"no such file in {tmp_path}")]
    if numbered:
        named = read_dataset("list", tmp_path / "list.txt", labels=["w", "x", "y", "z"])
        assert named.labels == ["w", "x", "y", "z"]
        assert named.samples == dataset.samples
        with pytest.raises(UsageError, match="has the label 3, and 3 labels are given"):
            read_dataset("list", tmp_path / "list.txt", labels=["w", "x", "y"])
    (tmp_path / "list.txt").write_text("a.mp4 1\nb.mp4\n")
    with pytest.raises(UsageError, match="list.txt, line 2 is 'b.mp4': `path label` is expected"):
        read_dataset("list", tmp_path / "list.txt")


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {
            "id": 0,
            "video_id": "video0",
            "category": 9,
            "url": "u",
            "start time": 137.72,
            "end time": 149.44,
            "split": "train",
        },
        {
            "id": 1,
            "video_id": "video1",
            "category": 3,
            "url": "u",
            "start time": 0.0,
            "end time": 9.0,
            "split": "validate",
        },
        {
            "id": 2,
            "video_id": "video2",
            "category": 3,
            "url": "u",
            "start time": 0.0,
            "end time": 9.0,
            "split": "train",
        },
        {
            "id": 3,
            "video_id": "video3",
            "category": 3,
            "url": "u",
            "start time": 0.0,
            "end time": 9.0,
            "split": "train",
        },
    ],
    "sentences": [
        {"caption": "a car \n is  shown", "video_id": "video0", "sen_id": 0},
        {"caption": "zwei Käfer", "video_id": "video1", "sen_id": 2},
        {"caption": "a car", "video_id": "video0", "sen_id": 1},
        {"caption": "gone", "video_id": "video3", "sen_id": 3},
    ],
}


def test_msrvtt(tmp_path, place):
    (tmp_path / "videodatainfo.json").write_text(json.dumps(MSRVTT, ensure_ascii=False), encoding="utf-8")
    place("TrainValVideo/video0.mp4", "TrainValVideo/video1.mp4", "TrainValVideo/video2.mp4")
    dataset = read_dataset("msrvtt", tmp_path / "videodatainfo.json", split="train")
    (sample,) = dataset.samples
    assert (sample.path.name, sample.captions, sample.targets) == ("video0.mp4", ("a car is shown", "a car"), ())
    assert (sample.start, sample.end) == (None, None), "the file is cut already"
    assert sample.caption == "a car is shown"
    assert (dataset.heads, dataset.labels) == ({}, [])
    assert dataset.missing == [("video2", "has no captions"), ("video3", f"no video video3 below {tmp_path}")]
    (val,) = read_dataset("msrvtt", tmp_path / "videodatainfo.json", split="val").samples
    assert val.caption == "zwei Käfer"
    assert [(s.id, s.captions) for s in dataset.per_caption().samples] == [
        ("video0#0", ("a car is shown",)),
        ("video0#1", ("a car",)),
    ]
    with pytest.raises(UsageError, match="has captions and no classes: give no `labels`"):
        read_dataset("msrvtt", tmp_path / "videodatainfo.json", labels=["a"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UsageError, match="has no `videos` and `sentences`"):
        read_dataset("msrvtt", tmp_path / "list.json")


def test_vatex(tmp_path, place):
    rows = [
        {"videoID": "_a-_b_000012_000022", "enCap": ["One.", "Two."], "chCap": ["一个人。"]},
        {"videoID": "whole_1_000001_000011", "enCap": ["Three."], "chCap": ["三"]},
        {"videoID": "gone_000001_000011", "enCap": ["Four."]},
        {"videoID": "test_000001_000011"},
    ]
    (tmp_path / "vatex_training_v1.0.json").write_text(json.dumps(rows))
    place("val/_a-_b_000012_000022.mp4", "whole_1.mkv", "test_000001_000011.mp4")
    dataset = read_dataset("vatex", tmp_path / "vatex_training_v1.0.json")
    assert [(s.id, s.captions, s.start, s.end) for s in dataset.samples] == [
        ("_a-_b_000012_000022", ("One.", "Two."), None, None),
        ("whole_1_000001_000011", ("Three.",), 1, 11),
    ]
    assert dataset.missing == [
        ("gone_000001_000011", f"no video gone_000001_000011 below {tmp_path}"),
        ("test_000001_000011", "has no enCap"),
    ]
    chinese = read_dataset("vatex-zh", tmp_path / "vatex_training_v1.0.json")
    assert [s.captions for s in chinese.samples] == [("一个人。",), ("三",)]


def test_label_files(tmp_path):
    labels = ["plain", "with, comma", "9 lives", "ünï"]
    write_labels(tmp_path / "labels.json", labels)
    assert read_labels(tmp_path / "labels.json") == labels
    contents = {
        "plain\nwith, comma\n9 lives\n": ["plain", "with, comma", "9 lives"],
        "b,1\nwith, comma,0\n": ["with, comma", "b"],
        "1 b c\n0 a\n": ["a", "b c"],
        "b c\t1\na\t0\n": ["a", "b c"],
        "id,key,instances\n1,b,[]\n0,a,[]\n": ["a", "b"],
        "\ufeffa\r\n\r\nb\r\n": ["a", "b"],
    }
    for content, expected in contents.items():
        (tmp_path / "labels.txt").write_bytes(content.encode())
        assert read_labels(tmp_path / "labels.txt") == expected
    for content, reason in (("a,0\nb,2\n", "numbers 2 labels otherwise than 0 to 1"), ("a\na\n", "holds 'a' twice")):
        (tmp_path / "labels.txt").write_text(content)
        with pytest.raises(UsageError, match=reason):
            read_labels(tmp_path / "labels.txt")
    (tmp_path / "labels.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(UsageError, match="labels.txt is not text in UTF-8"):
        read_labels(tmp_path / "labels.txt")
    with pytest.raises(UsageError, match="none.txt cannot be read .No such file or directory.: give"):
        read_labels(tmp_path / "none.txt")


def test_one_door(tmp_path):
    assert {"kinetics", "moments", "something", "epic", "folder", "list", "msrvtt", "vatex"} <= set(FORMATS)
    with pytest.raises(UsageError, match="'ava' is not a format of video data sets: choose one of kinetics, moments,"):
        read_dataset("ava", tmp_path)
    with pytest.raises(UsageError, match="the format kinetics needs `annotations`"):
        read_dataset("kinetics", root=tmp_path)
    with pytest.raises(UsageError, match="test has no videos here: check the split"):
        VideoDataset("test", [])


@pytest.mark.parametrize(
    ("format", "text", "what"),
    [
        ("kinetics", "label,youtube_id,time_start,time_end,split\nwalk,abc,0:10,0:20,train\n", "ValueError.*'0:10'"),
        ("epic", "P1_2,P1,P1_1,0,00:10,00:12.0,1,2,n,v,0,n,0,x,x\n", "ValueError: not enough values"),
        ("vatex", '[{"videoID": "abc", "enCap": ["a"]}]', "ValueError: not enough values"),
        ("msrvtt", '{"videos": [{"id": 1}], "sentences": []}', "KeyError: 'video_id'"),
        ("something", '[{"id": 1, "template": ["a"]}]', "TypeError: expected string"),
    ],
)
def test_values_out_of_place_are_a_sentence(format, text, what, tmp_path):
    path = tmp_path / "annotations"
    path.write_text(text)
    with pytest.raises(
        UsageError, match=f"hold what the format {format} does not .*{what}.*give the files as published"
    ):
        read_dataset(format, path)


def test_parts_of_a_video(tmp_path):
    path = write_video(tmp_path / "clip.mp4", 50)

    def seen(fps=25, **part):
        with VideoSample(path, **part).opened(fps) as (video, ticks):
            return numbers_of(video.frames(ticks))

    assert seen() == list(range(50))
    assert seen(start=0.28, end=0.4) == [7, 8, 9], "0.28 x 25 is 7, though not in floats"
    assert seen(start=0.281, end=0.4) == [8, 9]
    assert seen(start=1.92) == [48, 49]
    assert seen(start=1.92, end=99.0) == [48, 49], "a part may reach beyond the end"
    assert seen(start=1.99, end=99.0) == [49], "beyond the last frame's start, not its end"
    assert seen(start=0.5, end=0.5) == [13], "never nothing"
    assert seen(start=-3.0, end=0.08) == [0, 1]
    assert seen(start=0.28, end=0.4, fps=None) == [7, 8, 9]
    assert seen(start=0.2, end=0.41, fps=10) == [5, 7, 10]
    with pytest.raises(
        Exception, match="clip.mp4 lasts 2.00 s and was to be read from 2.00 s on: check its annotation"
    ):
        seen(start=2.0, end=3.0)
