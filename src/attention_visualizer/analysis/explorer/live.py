"""The explorer with a kernel behind it: another image, heads switched off, every patch of a layer of a large model."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources
from typing import Any

import anywidget
import traitlets

from attention_visualizer.analysis.explorer.chapter import contents_of, observe_samples, samples_of, stride_of
from attention_visualizer.analysis.study.samples import SampleChoice, find_samples
from attention_visualizer.analysis.study.study import Study
from attention_visualizer.attention.capture import CaptureError, intervene
from attention_visualizer.attention.edits import switch_off, together
from attention_visualizer.explorer.contents import Contents
from attention_visualizer.explorer.page import ROOM, render
from attention_visualizer.measures.observation import RowOptions
from attention_visualizer.support.errors import UserError

Head = tuple[int, int]  # numbers of a layer and of a head in it, from 0


class LiveExplorer(anywidget.AnyWidget):
    """A widget that shows the explorer's page of one image, and makes another when it is asked to: `request` has an
    action, "image", "off", "on" or "whole", and the layer and head that are shown."""

    _esm = resources.files(ROOM).joinpath("live.js").read_text("utf-8")
    page = traitlets.Unicode().tag(sync=True)
    status = traitlets.Unicode().tag(sync=True)
    image = traitlets.Int().tag(sync=True)  # its number in the image set
    num_images = traitlets.Int().tag(sync=True)
    has_cells = traitlets.Bool().tag(sync=True)  # whether patches of a layer are shown together
    request = traitlets.Dict().tag(sync=True)
    answered = traitlets.Int().tag(sync=True)  # the number of the request that page and status are of

    def __init__(self, study: Study, image: int = 0) -> None:
        super().__init__()
        self.study = replace(study, history=None, compared_runs=())
        self.num_images = len(study.target.images)
        self.off: list[Head] = []
        self.whole: str | None = None  # the layer that every patch is shown of
        self._show(image)
        self.observe(self._answer, names="request")

    def _answer(self, change: Any) -> None:
        request = change["new"]
        head = request["layer"], request["head"]
        before = list(self.off), self.whole
        try:
            if request["action"] == "off" and head not in self.off:
                self.off.append(head)
            elif request["action"] == "on":
                self.off.clear()
            elif request["action"] == "whole":
                self.whole = self.contents.layers[request["layer"]].name
            image = request["image"] if request["action"] == "image" else self.image
            if not isinstance(image, int):
                raise UserError(f"give the number of an image, from 0 to {self.num_images - 1}")
            self._show(image)
        except (UserError, CaptureError) as error:
            self.off, self.whole = before
            self.status = f"Error: {error}"
        self.answered = request.get("number", self.answered + 1)

    def _show(self, image: int) -> None:
        sample = find_samples(self.study.target, SampleChoice(samples=[image]))
        study = replace(self.study, samples=sample)
        # The image is there twice where heads are off.
        half = replace(study, explorer_bytes=study.explorer_bytes // 2) if self.off else study
        contents = contents_of(half, self.whole)
        if contents is None:
            raise UserError("not even a few rows of this image fit into a page: give a larger explorer_mb=")
        for layer, head in self.off:
            if head >= contents.layers[layer].num_heads:
                raise UserError("that is no head: choose one in the table, and then switch it off")
        if self.off:
            contents = self._with_edited(study, contents)
        self.contents, self.image = contents, image
        self.has_cells = stride_of(contents.layers) > 1
        self.page = render(contents)
        self.status = self._said(contents)

    def _with_edited(self, study: Study, contents: Contents) -> Contents:
        """Add the image by the model without the heads that are off."""
        names = [layer.name for layer in contents.layers]
        edit = together([switch_off(names[layer], head) for layer, head in self.off])
        options = RowOptions(study.explorer_bytes, stride_of(contents.layers), self.whole)
        with intervene(study.target.model, edit):
            observation = observe_samples(study.target, study.samples, options)
        title = f"Without {', '.join(f'head {contents.layers[layer].number}.{head + 1}' for layer, head in self.off)}"
        edited = samples_of(study, study.samples, ("edited", title), title, observation)
        return replace(contents, groups=[*contents.groups, edited])

    def _said(self, contents: Contents) -> str:
        answers = []
        for group in contents.groups:
            predicted, probability = group.moments[0].predicted[0], group.moments[0].probability[0]
            share = "" if probability is None else f" ({probability:.1%})"
            answers.append(f"{predicted}{share}" if predicted is not None else "")
        if len(answers) == 1:
            return f"predicted {answers[0]}" if answers[0] else ""
        return (
            f"{contents.groups[1].title}: predicted {answers[0]} → {answers[1]}"
            if answers[0]
            else contents.groups[1].title
        )
