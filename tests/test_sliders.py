"""Sliders: one for each range, and only where somebody can move them."""

import pytest
from jupyter_client.manager import start_new_kernel

from paper_lib.results import sliders


def test_a_moved_slider_redraws_the_figure(monkeypatch):
    drawn = []
    monkeypatch.setattr(sliders, "live", lambda: True)

    def draw(lr, decay, lag):
        drawn.append((lr, pytest.approx(decay), lag))

    shown = sliders.sliders(draw, lr=[0.1, 0.3, 1.0], decay=(0.0, 0.99, 0.95), lag=(1, 200, 7))
    lr, decay, lag = shown.children[:3]
    assert (lr.value, decay.value, lag.value) == (0.3, pytest.approx(0.95, abs=0.01), 7)
    lag.value = 9
    lr.value = 1.0
    assert drawn[-2:] == [(0.3, decay.value, 9), (1.0, decay.value, 9)]


def test_sliders_appear_only_where_somebody_can_move_them():
    assert sliders.sliders(print, lag=(1, 2, 1)) is None  # no kernel at all
    manager, client = start_new_kernel()
    try:
        for asked in (True, False):  # as JupyterLab asks, and as papermill does
            said = []
            code = "from paper_lib.results import sliders; print(sliders.live())"
            client.execute_interactive(
                code, allow_stdin=asked, output_hook=said.append, timeout=120
            )
            printed = [m["content"]["text"] for m in said if m["msg_type"] == "stream"]
            assert printed == [f"{asked}\n"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
