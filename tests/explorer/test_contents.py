"""What an explorer's page holds is the attention, to 1/255 of each row's maximum, and nothing that a browser obeys."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch

from attention_visualizer.explorer.contents import deflated
from attention_visualizer.explorer.page import digest, json_for_html, render
from attention_visualizer.measures.map_measures import attention_entropy
from attention_visualizer.measures.quantised_rows import STEPS, QuantisedRows, concatenated, stacked
from tests.helpers.explorer_pages import HEADS, HOSTILE, LAYERS, TOKENS, random_contents, random_weights


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 20.0])
def test_codes_tell_weights_to_a_255th_of_their_rows_maximum(sharpness: float) -> None:
    weights = (sharpness * torch.randn(5, 4, 300)).softmax(dim=-1)
    rows = QuantisedRows.of(weights)
    limit = weights.amax(dim=-1, keepdim=True).numpy() / STEPS
    assert (np.abs(rows.weights() - weights.numpy()) <= limit).all()
    np.testing.assert_allclose(rows.entropy, attention_entropy(weights), rtol=1e-3, atol=1e-3)
    assert rows.nbytes == 5 * 4 * (300 + 2 + 2)


def test_a_row_that_attends_to_nothing_is_zero() -> None:
    rows = QuantisedRows.of(torch.zeros(2, 3))
    assert not rows.codes.any() and not rows.weights().any()


def test_rows_are_put_together() -> None:
    first, second = (QuantisedRows.of(random_weights(seed, 2)) for seed in (0, 1))
    assert np.array_equal(stacked([first, second], axis=1).codes[:, 1], second.codes)
    assert np.array_equal(concatenated([first, second]).maximum[2:], second.maximum)


def test_a_page_holds_all_rows() -> None:
    contents, weights = random_contents()
    page = render(contents)
    packed = re.search(r'id="rows">([^<]*)<', page)
    assert packed is not None
    content = np.frombuffer(zlib.decompress(base64.b64decode(packed.group(1)), -zlib.MAX_WBITS), np.uint8)
    sizes = [4 * 3 * LAYERS * HEADS * TOKENS, 2 * LAYERS * HEADS * TOKENS]  # rows
    assert len(content) == sum(sizes) * (TOKENS + 4)
    rows, start = 4 * 3 * HEADS * TOKENS, 0  # of a layer of the first group
    for layer in range(LAYERS):
        codes = content[start:][: rows * TOKENS].reshape(4, 3, HEADS, TOKENS, TOKENS)
        maxima = content[start + rows * TOKENS :][: 2 * rows].view("<f2").reshape(codes.shape[:-1])
        for moment, each in enumerate(weights[:4]):
            found, expected = codes[moment] / 255 * maxima[moment][..., None].astype(np.float64), each[:, layer]
            assert (np.abs(found - expected.numpy()) <= expected.amax(-1, keepdim=True).numpy() / 255).all()
        start += rows * (TOKENS + 4)


def test_the_policy_lets_only_the_pages_own_script_run() -> None:
    page = render(random_contents()[0])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert len(scripts) == len(styles) == 1
    assert policy.group(1).replace("&#39;", "'") == (
        f"default-src 'none'; img-src data: blob:; script-src '{digest(scripts[0])}'; style-src '{digest(styles[0])}'"
    )
    markup = page.replace(scripts[0], "")
    assert " style=" not in markup and not re.search(r"<[^>]* on\w+=", markup)


def test_names_of_others_are_no_markup() -> None:
    page = render(random_contents()[0])
    assert "<img src=x" not in page and HOSTILE not in page
    header = re.search(r'id="header">([^<]*)</script>', page)
    assert header is not None and json.loads(header.group(1))["warnings"] == [HOSTILE]
    assert json.loads(json_for_html({"a": "</script>\u2028é数"})) == {"a": "</script>\u2028é数"}


def test_nothing_in_the_page_is_fetched() -> None:
    named = re.findall(r"https?://[^\"' ]*|@import|url\([^)]*", render(random_contents()[0]))
    assert set(named) == {"http://www.w3.org/2000/svg", "url(#scale"}  # in the drawing that is saved


def test_deflating_is_lossless() -> None:
    values = np.arange(1000, dtype=np.uint8)
    assert zlib.decompress(base64.b64decode(deflated(values)), -15) == values.tobytes()
