"""Logging: the console on the main process, a file in WORK_DIR, and no secret in either."""
from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path

from scepter.core.secrets import hide

FORMAT = '%(asctime)s %(levelname).1s %(message)s'


def get_logger(name: str = 'scepter') -> logging.Logger:
    """The framework's logger; every logger of ours is below the one called `scepter`."""
    logger = logging.getLogger('scepter')
    if not logger.handlers:
        logger.addHandler(_handler(_TqdmHandler()))
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger if name == 'scepter' else logger.getChild(name)


def set_up_logging(work_dir: str | Path | None, rank: int = 0, debug: bool = False, file_name: str = 'log.txt') -> None:
    """Show INFO on the main process (ERROR on the others) and append all of it to WORK_DIR/log.txt (log-rank1.txt, ...)."""
    logger = get_logger()
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    for handler in list(logger.handlers):
        if isinstance(handler, logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()
        else:
            handler.setLevel(logging.DEBUG if rank == 0 else logging.ERROR)
    if work_dir is not None:
        path = Path(work_dir) / file_name
        path = path if rank == 0 else path.with_name(f'{path.stem}-rank{rank}{path.suffix}')
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.addHandler(_handler(_LogFile(path, encoding='utf-8')))


def duration(seconds: float) -> str:
    """0:42, 3:12 or 1:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}' if hours else f'{minutes}:{rest:02}'


def _handler(handler: logging.Handler) -> logging.Handler:
    handler.setFormatter(_Formatter(FORMAT, datefmt='%H:%M:%S'))
    return handler


def note_traceback() -> None:
    """Write the traceback of the error at hand to the log file alone; the console shows its message, and with --debug this too."""
    logger = get_logger()
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, 'the error in full', (), sys.exc_info())
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler) or logger.isEnabledFor(logging.DEBUG):
            handler.emit(record)


class _LogFile(logging.FileHandler):
    """A log file whose disk may be full: that is said once on the console, and is no reason to end a run."""

    is_failing = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.is_failing:
            self.is_failing = True
            get_logger().warning(f'{self.baseFilename} cannot be written, what follows may be missing there: {error.strerror}')

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Formatter(logging.Formatter):
    """Shows no secret; the whole text is searched, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return hide(super().format(record))


class _TqdmHandler(logging.StreamHandler):
    """Writes to the stderr of the moment, above a progress bar where one is on the screen."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        bars = sys.modules.get('tqdm')
        if bars is None or not getattr(bars.tqdm, '_instances', None):
            super().emit(record)
        else:
            bars.tqdm.write(self.format(record), file=sys.stderr)
