"""Clips that we make: labelled ones, of which some only motion tells apart, and captioned scenes."""

from modicum.video.synthetic.classes import FRAME_LABELS, LABELS, MOTION_LABELS, labelled_clip, shuffle_frames
from modicum.video.synthetic.files import CAPTIONS, FPS, write_captioned, write_clip, write_dataset
from modicum.video.synthetic.render import render
from modicum.video.synthetic.scenes import FACTS, Event, Scene, draw_scene, facts_of, score_facts

__all__ = [
    "CAPTIONS",
    "FACTS",
    "FPS",
    "FRAME_LABELS",
    "LABELS",
    "MOTION_LABELS",
    "Event",
    "Scene",
    "draw_scene",
    "facts_of",
    "labelled_clip",
    "render",
    "score_facts",
    "shuffle_frames",
    "write_captioned",
    "write_clip",
    "write_dataset",
]
