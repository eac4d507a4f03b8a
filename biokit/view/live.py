"""A live panel in a notebook: the curve, one line of figures, and a stop button that works.

The training runs in a process of its own; a daemon thread redraws from the metrics file, and the button writes the
run's STOP file. Without widgets (papermill, nbconvert, a code host's preview) the same output is a PNG and words.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
from typing import Any

from biokit.view.picture import Picture
from biokit.view.training import Run, RunState, folder_of, read_state, show_training

REFRESH_S = 1.0
DRAWING_SHARE = 0.2  # at most this share of the time goes into drawing
_numbers = itertools.count(1)


class LivePanel:
    """Shows a run while it trains and ends by itself when the run ends.

    Attributes:
        state: what the run folder said at the last look.
        picture: the curve at the last look.
    """

    def __init__(self, run: Run, *, scale: str = "linear", title: str = "") -> None:
        self._run, self._folder = run, folder_of(run)
        self._scale, self._title = scale, title
        self._stop_asked = False
        self._display_id = f"biokit-live-{id(self)}-{next(_numbers)}"
        self._displayed = False
        self._leaving = threading.Event()
        self.state: RunState = read_state(run)
        self.picture: Picture = self.draw()
        self._widget, self._image, self._label, self._button = self._build()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="biokit-live-panel")
        self._thread.start()
        atexit.register(self._leave)

    def stop(self) -> None:
        """What the button does: ask the run to save a checkpoint at the next step boundary and end."""
        self._stop_asked = True
        self._folder.request_stop()
        if self._button is not None:
            self._button.disabled, self._button.description = True, "Stopping…"

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended and its last curve is drawn; False where `timeout_s` passed first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def draw(self) -> Picture:
        """The picture for `state`; another kind of panel draws another one."""
        title = self._title or (str(self.state) if self.state.ended else "")
        return show_training(self._run, scale=self._scale, title=title)

    def refresh(self) -> None:
        """Read the run folder and redraw."""
        if self._stop_asked and not self.state.ended:
            self._folder.request_stop()  # again: a training that just starts may have cleared an older STOP file
        self.state = read_state(self._run)
        self.picture = self.draw()
        if self._image is not None:
            self._image.value, self._image.alt = self.picture.png, self.picture.alt
            self._label.value = str(self.state)
        if self.state.ended:
            self._finish()

    def _finish(self) -> None:
        if self._button is not None:
            self._button.disabled, self._button.description = True, f"Run {self.state.status}"
            self._button.icon = ""
        if self._displayed:  # notebooks keep the last picture without the widgets, which need a live kernel
            from IPython.display import display

            display(self._static_bundle(), raw=True, display_id=self._display_id, update=True)

    def _watch(self) -> None:
        """Redraw until the run has ended; a run folder that cannot be read now is read again."""
        while not self.state.ended and not self._leaving.is_set():
            started = time.monotonic()
            with contextlib.suppress(OSError, ValueError):
                self.refresh()
            spent = time.monotonic() - started
            self._leaving.wait(max(REFRESH_S, spent / DRAWING_SHARE - spent))
        if self.state.ended:
            self.refresh()
            atexit.unregister(self._leave)

    def _leave(self) -> None:
        """Python ends while the run goes on: a thread that still draws then would crash it."""
        self._leaving.set()
        self._thread.join()

    def _build(self) -> tuple[Any, Any, Any, Any]:
        """The widgets: (box, image, label, button); all None where ipywidgets is not installed."""
        try:
            import ipywidgets
        except ImportError:
            return None, None, None, None
        image = ipywidgets.Image(value=self.picture.png, format="png", layout={"max_width": "100%"})
        label = ipywidgets.Label(str(self.state))
        button = ipywidgets.Button(
            description="Stop training",
            icon="stop",
            tooltip="Save a checkpoint at the next step boundary and end",
            layout={"width": "150px"},
        )
        button.add_class("biokit-stop")
        button.on_click(lambda _: self.stop())
        return ipywidgets.VBox([ipywidgets.HBox([button, label]), image]), image, label, button

    def _static_bundle(self) -> dict[str, Any]:
        static = self.picture._repr_mimebundle_()
        return {**static, "text/plain": f"{self.state}\n{static['text/plain']}"}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        live = {} if self._widget is None else self._widget._repr_mimebundle_()
        return {**live, **self._static_bundle()}

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._displayed = True
        display(self._repr_mimebundle_(), raw=True, display_id=self._display_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._folder.path}: {self.state})"
