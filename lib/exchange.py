"""Files from and to a browser, as widgets that work in JupyterLab and in Voilà alike.

ipywidgets' own upload sends a file as one message, which servers of Jupyter drop above 10 MB without a word.
"""

from collections.abc import Callable
from pathlib import Path

import anywidget
from traitlets import Bool, Instance, Unicode

from lib import uploads
from lib.errors import CourseError

HERE = Path(__file__).parent


class FileUpload(anywidget.AnyWidget):
    """Receives one file at a time into `folder`; `received` is the last one that was taken, or None, `name` what the
    person calls it, `said` what they read: how far it is, what it was taken for, or why it is refused."""

    _esm = HERE / "upload.js"
    label = Unicode().tag(sync=True)
    accept = Unicode(uploads.ACCEPTED).tag(sync=True)
    said = Unicode().tag(sync=True)
    disabled = Bool(False).tag(sync=True)
    name = Unicode()
    received = Instance(uploads.Received, allow_none=True)

    def __init__(self, folder: Path, **traits):
        super().__init__(**traits)
        self.folder, self.upload, self.number = folder, None, None
        self.on_msg(self._heard)

    def clear(self) -> None:
        """Forget the file that was taken."""
        self.received, self.name, self.said = None, "", ""

    def _heard(self, _, message: dict, buffers: list) -> None:
        try:
            if "begin" in message:
                self._begin(message)
            elif message.get("piece") == self.number and self.upload:
                self._add(bytes(buffers[0]))
            elif message.get("unreadable") == self.number and self.upload:
                raise CourseError(f"The browser cannot read {self.upload.name}.", uploads.AGAIN)
        except CourseError as error:
            self._refuse(str(error))
        except OSError as error:
            self._refuse(f"The file could not be kept: {error.strerror}. Make room on the disk and send it again.")

    def _begin(self, message: dict) -> None:
        self._drop()
        self.clear()
        self.number, self.upload = message["begin"], uploads.Upload(self.folder, message["name"], message["size"])
        self._ask()

    def _add(self, piece: bytes) -> None:
        self.upload.add(piece)
        if piece and self.upload.received < self.upload.size:
            self._ask()
            return
        upload, self.upload = self.upload, None
        self.said = f"Examining {upload.name} …"
        received = upload.finish()
        self.name, self.received = upload.name, received
        self.said = f"{upload.name}: {received.kind}, {upload.size / 1e6:.1f} MB received."

    def _ask(self) -> None:
        self.said = f"Receiving {self.upload.name}: {100 * self.upload.received // self.upload.size} %"
        self.send({"number": self.number, "next": self.upload.received})

    def _refuse(self, why: str) -> None:
        self._drop()
        self.said = why.replace("\n", " ")

    def _drop(self) -> None:
        if self.upload:
            self.upload.drop()
        self.upload = None


class FileDownload(anywidget.AnyWidget):
    """A button that makes a file when it is asked for: `make` returns its name and content."""

    _esm = HERE / "download.js"
    label = Unicode().tag(sync=True)

    def __init__(self, label: str, make: Callable[[], tuple[str, bytes]]):
        super().__init__(label=label)
        self.make = make
        self.on_msg(self._asked)

    def _asked(self, _, message: dict, buffers: list) -> None:
        try:
            name, content = self.make()
        except CourseError as error:
            self.send({"said": str(error)})
        except Exception as error:  # the page lives on
            self.send({"said": f"The file could not be made: {type(error).__name__}."})
        else:
            self.send({"name": name}, buffers=[content])
