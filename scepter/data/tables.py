"""Tables whose rows are images: what a row says, wherever the table comes from, and where the picture itself is."""
from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

from scepter.core.config import Config
from scepter.core.disk import atomic
from scepter.core.errors import DataError
from scepter.core.faults import Fault, did_you_mean
from scepter.core.registry import DATASETS, need
from scepter.core.schema import param
from scepter.core.stores import FS
from scepter.data.captions import Texts, texts_of
from scepter.data.datasets import ImageTextDataset, Record
from scepter.data.images import UnreadableError
from scepter.data.index import digest, stamps
from scepter.data.rows import LIST_DELIMITER, LIST_FIELDS, ParquetCells, Place, Row, addresses, holds_bytes, joined, rows, write_parquet
from scepter.data.sources import Source

# how columns are called where nobody says it: in lower case, without the public project's :FILE
IMAGE_COLUMNS = ('image', 'file_name', 'filename', 'img_path', 'image_path', 'path', 'file', 'target', 'img', 'jpg', 'image_url', 'url')
CAPTION_COLUMNS = ('text', 'caption', 'prompt', 'captions', 'description')


class ImageRowsDataset(ImageTextDataset):
    """Rows of columns, of which some are pictures and some are texts: a subclass says where the rows are.

    A picture is a path below ROOT, an address in a store, or the bytes themselves.
    """

    IMAGE: str | None = param(None, f'Column of the image; null: the first of {", ".join(IMAGE_COLUMNS[:6])}, ... that there is.')
    CAPTION: str | list[str] | dict[str, float] | None = param(
        None, f'Column of the caption; several: one of them is drawn, {{long: 3, short: 1}} with weights; null: the first of '
              f'{", ".join(CAPTION_COLUMNS[:3])} that there is. A cell may hold a list, of which one is drawn.')
    ROOT: str | None = param(None, 'Folder or address that the paths of pictures are below; null: where the rows come from.')
    LABEL: str | None = param(None, 'Column of whole numbers that becomes `label`.')
    BESIDE: dict[str, str] = param({}, 'Further pictures of the sample and their columns, cut and mirrored alike: {mask: mask_file}.')

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if taken := {'image', 'prompt', 'label', 'target_size'} & set(cfg.BESIDE):
            yield Fault('BESIDE', f'{", ".join(sorted(taken))} is a key that a sample has already: give the picture another')
        if isinstance(cfg.CAPTION, dict) and not any(weight > 0 for weight in cfg.CAPTION.values()):
            yield Fault('CAPTION', 'every weight is 0: nothing is left')

    root: str    # the folder or address that paths are below; '' where a path has no meaning

    def table_rows(self) -> Iterator[tuple[str, Row]]:
        """(where it is, the row) of each, a cell of bytes as a Place."""
        raise NotImplementedError

    cells: ParquetCells | _HubCells    # (column, *what a Place says) -> what that cell holds: bytes, or {bytes, path}

    # ---------------------------------------------------------------- what a row says
    @property
    def weights(self) -> Sequence[float]:
        return list(self.CAPTION.values()) if isinstance(self.CAPTION, dict) else [1.0] * max(1, len(self._captions))

    @property
    def _captions(self) -> list[str]:
        return [] if self.CAPTION is None else [self.CAPTION] if isinstance(self.CAPTION, str) else list(self.CAPTION)

    def find(self) -> Iterable[Record]:
        columns: tuple[str, list[str]] | None = None
        for where, row in self.table_rows():
            if columns is None:
                columns = self._columns(where, list(row))
            image, captions = columns
            texts = self._texts(where, row, captions)
            beside = {key: self._place(where, column, row.get(column)) for key, column in self.BESIDE.items()}
            place = self._place(where, image, row.get(image))
            name = place if isinstance(place, str) else where
            yield Record(name, place, texts if any(texts) else None, None, self._label(where, row), _size(row), beside or None)
        if columns is None:
            raise DataError(f'{self.place} has no row')

    def _columns(self, where: str, there: list[str]) -> tuple[str, list[str]]:
        """The columns of the image and the captions. Raises DataError where they are not there."""
        for column in (self.IMAGE, *self._captions, self.LABEL, *self.BESIDE.values()):
            if column is not None and column not in there:
                raise DataError(f'{where}: no column {column}{did_you_mean(column, there)}; it has {", ".join(there)}')
        plain = {name.lower().removesuffix(':file'): name for name in reversed(there)}
        image = self.IMAGE or next((plain[name] for name in IMAGE_COLUMNS if name in plain), None)
        if image is None:
            raise DataError(f'{where}: none of the columns {", ".join(there)} is called as one of images is: name it by IMAGE')
        guessed = next(([plain[name]] for name in CAPTION_COLUMNS if name in plain and plain[name] != image), [])
        return image, self._captions or guessed

    def _texts(self, where: str, row: Row, captions: list[str]) -> Texts:
        try:
            return [texts_of(row.get(column)) for column in captions]
        except ValueError as error:
            raise DataError(f'{where}: {error}') from error

    def _label(self, where: str, row: Row) -> int | None:
        if self.LABEL is None:
            return None
        try:
            return int(row[self.LABEL])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f'{where}: {self.LABEL} is a whole number, got {row.get(self.LABEL)!r:.60}') from error

    def _place(self, where: str, column: str, value: Any) -> Any:
        """Where the picture in a cell is: a path, an address, or what `cells` takes."""
        if isinstance(value, Place):
            return [column, *value]
        if isinstance(value, dict):
            value = value.get('path')
        if not isinstance(value, str) or not value:
            raise DataError(f'{where}: {column} is the path of a picture, got {value!r:.60}')
        try:
            return joined(self.root, value)
        except ValueError as error:
            raise DataError(f'{where}: {error}; paths are below ROOT, which is the folder of the table where it is not given') from error

    # ---------------------------------------------------------------- pictures
    def open_image(self, place: Any) -> str | BinaryIO:
        if isinstance(place, list):
            value = self.cells(*place)
            if isinstance(value, dict):
                place, value = value.get('path'), value.get('bytes')
            if isinstance(value, bytes):
                return io.BytesIO(value)
            if not isinstance(place, str):
                raise UnreadableError(f'the cell is empty: {value!r:.60}')
            place = joined(self.root, place)
        if '://' not in place:
            return place
        with FS.get_from(place) as path:
            return path

    def source_of(self, index: int) -> Source | None:
        place = self.record(index).place
        found = self.cells.source(*place) if isinstance(place, list) else None
        return found or super().source_of(index)

    def bytes_of(self, index: int) -> bytes:
        found = self.open_image(self.record(index).place)
        assert not isinstance(found, str), 'a cell that is a source holds bytes'
        with found:
            return found.read()


@DATASETS.register_class()
class ImageTextTableDataset(ImageRowsDataset):
    """A table of images: CSV, TSV, JSON lines, JSON, Parquet, or a list with a delimiter.    index  ->  image, prompt, label, BESIDE's

    Each row is checked at the first start, which keeps an index; a broken one is a DataError that gives file and line.
    """

    TABLE: str | list[str] = param(doc='The file, local or in any store, by whose suffix its kind is known; several of one kind; '
                                       '{000..012} counts, and a local name may hold * and ?.')
    FIELDS: list[str] = param([], f'Columns of a list, which has no heading; empty: {LIST_DELIMITER.join(LIST_FIELDS)} of a .txt file.')
    DELIMITER: str | None = param(None, f'What stands between the columns of a list, no quotes; null: {LIST_DELIMITER} in a .txt file.')

    def sources(self) -> list[str]:
        words = [self.TABLE] if isinstance(self.TABLE, str) else self.TABLE
        self.place = words[0] if len(words) == 1 else f'{words[0]} and {len(words) - 1} more'
        self.addresses = [found for word in words for found in addresses(word, 'TABLE')]
        self.paths: list[str] = []
        for address in self.addresses:
            with FS.get_from(address) as path:
                self.paths.append(os.path.abspath(path))
        root = self.ROOT or next(iter(self.addresses), '')
        if self.ROOT is None:
            root = root[:max(root.rfind('/'), root.rfind('@')) + 1] if '://' in root else os.path.dirname(self.paths[0])
        self.root = root if '://' in root else os.path.abspath(os.path.expanduser(root))
        self.cells = ParquetCells(self.paths)
        return self.paths

    def table_rows(self) -> Iterator[tuple[str, Row]]:
        for number, (path, address) in enumerate(zip(self.paths, self.addresses)):
            yield from rows(path, address, self.FIELDS or None, self.DELIMITER, number)


@DATASETS.register_class()
class ImageTextHubDataset(ImageRowsDataset):
    """What the library `datasets` reads: a folder that it saved, or load_dataset(DATASET, ...).    index  ->  as ImageTextTableDataset

    Its Arrow files are read in place, in any order. Of a stream (STREAM), which has no order of ours, the rows are kept in a Parquet file
    in $SCEPTER_CACHE first, once.
    """

    DATASET: str = param(doc="Folder of save_to_disk, or load_dataset's first word: a repository, a folder, imagefolder, parquet, ...")
    SUBSET: str | None = param(None, 'The configuration, where the dataset has several.')
    SPLIT: str = param('train', 'The split, also a part of it: train[:10%].')
    DATA_FILES: str | list[str] | None = param(None, 'Files, where DATASET is a kind of file.')
    DATA_DIR: str | None = param(None, 'Folder, where DATASET is a kind of folder.')
    REVISION: str | None = param(None, 'Branch, tag or commit of the repository.')
    STREAM: bool = param(False, 'Read it once from beginning to end, instead of fetching its files.')
    COUNT: int | None = param(None, 'Of a stream, only the first so many rows.', least=1)

    @classmethod
    def check(cls, cfg: Config) -> Iterator[Fault]:
        yield from super().check(cfg)
        if cfg.COUNT is not None and not cfg.STREAM:
            yield Fault('COUNT', "is of a stream; of all else SPLIT says it: 'train[:100]'")

    def sources(self) -> list[str]:
        library = need('datasets', 'data')
        self.place = self.DATASET
        # the library tells pictures by their paths, which are below the folder that was given, or below its own cache
        folder = next((f for f in (self.ROOT, self.DATA_DIR, self.DATASET) if f and os.path.isdir(os.path.expanduser(f))), None)
        self.root = os.path.abspath(os.path.expanduser(folder or library.config.HF_CACHE_HOME))
        with self._explained(library):
            if self.STREAM:
                self.paths = [self._streamed(library)]
                self.cells = ParquetCells(self.paths)
                return self.paths
            self.table = self._loaded(library)
        self.cells = _HubCells(self.table)
        return [file['filename'] for file in self.table.cache_files]

    def table_rows(self) -> Iterator[tuple[str, Row]]:
        if self.STREAM:
            yield from rows(self.paths[0], self.DATASET)
            return
        schema = self.table.features.arrow_schema
        far = [field.name for field in schema if holds_bytes(field.type)]
        near = [name for name in schema.names if name not in far]
        batches = self.table.select_columns(near).with_format('arrow').iter(1000) if near else iter(())
        found = (row for batch in batches for row in batch.to_pylist()) if near else ({} for _ in range(len(self.table)))
        for i, row in enumerate(found):
            yield f'{self.DATASET}, row {i + 1}', {**row, **dict.fromkeys(far, Place(0, 0, i))}

    def _loaded(self, library: Any) -> Any:
        """The split as the library has it, in its Arrow files."""
        folder = os.path.expanduser(self.DATASET)
        if os.path.isfile(os.path.join(folder, 'state.json')):
            return library.load_from_disk(folder)
        if os.path.isfile(os.path.join(folder, 'dataset_dict.json')):
            found = library.load_from_disk(folder)
            if self.SPLIT not in found:
                raise DataError(f'{self.DATASET} has no split {self.SPLIT}{did_you_mean(self.SPLIT, found)}; it has {", ".join(found)}')
            return found[self.SPLIT]
        return library.load_dataset(*self._words, **self._options)

    @property
    def _words(self) -> list[str]:
        return [self.DATASET] if self.SUBSET is None else [self.DATASET, self.SUBSET]

    @property
    def _options(self) -> dict[str, Any]:
        options = {'split': self.SPLIT, 'data_files': self.DATA_FILES, 'data_dir': self.DATA_DIR, 'revision': self.REVISION}
        return {key: value for key, value in options.items() if value is not None}

    def _streamed(self, library: Any) -> str:
        """A Parquet file with the rows of the stream, their pictures inside; written once."""
        path = FS.cache / 'streams' / f'{digest([self._words, self._options, self.COUNT])}.parquet'
        if path.exists():
            self.logger.info(f'{self.DATASET}: the rows that were kept of the stream in {path}; delete it to read the stream again')
            return str(path)
        stream = library.load_dataset(*self._words, **self._options, streaming=True)
        for name, kind in (stream.features or {}).items():
            if isinstance(kind, library.Image):
                stream = stream.cast_column(name, library.Image(decode=False))
        self.logger.info(f'{self.DATASET}: the stream is read into {path}')
        with atomic.replacing(path) as temporary:
            write_parquet(temporary, map(_with_bytes, stream if self.COUNT is None else stream.take(self.COUNT)),
                          stream.features and stream.features.arrow_schema)
        return str(path)

    @contextmanager
    def _explained(self, library: Any) -> Iterator[None]:
        """What the library cannot find or read, as a DataError."""
        try:
            yield
        except (OSError, ValueError, library.exceptions.DatasetsError) as error:
            raise DataError(f'{self.DATASET} cannot be loaded by the library datasets: {type(error).__name__}: {error}') from error


class _HubCells:
    """A cell of a Dataset of the library."""

    def __init__(self, table: Any):
        self.table = table
        self._columns: dict[str, Any] = {}
        self._are_bytes: dict[str, bool] = {}
        self._files = [file['filename'] for file in table.cache_files]
        self._state = digest(stamps(self._files))    # which of them a row is in cannot be told: where one changes, all have

    def __call__(self, column: str, file: int, group: int, row: int) -> Any:
        if column not in self._columns:
            self._columns[column] = self.table.select_columns([column]).with_format('arrow')
        return self._columns[column][row].column(0)[0].as_py()

    def source(self, column: str, file: int, group: int, row: int) -> Source | None:
        """A cell as a source, without reading it; None where not every cell of its column holds bytes, or none is in a file."""
        if column not in self._are_bytes:
            found = self.table.data.column(column)
            leaf = found if found.type.num_fields == 0 else need('pyarrow.compute', 'data').struct_field(found, 'bytes')
            self._are_bytes[column] = bool(self._files) and not leaf.null_count
        return Source(self._files[0], cell=f'{column}/{row}/{self._state}') if self._are_bytes[column] else None


def _with_bytes(row: Row) -> Row:
    """A streamed row whose pictures are in it, and not only their addresses."""
    fsspec = need('fsspec', 'data')
    filled = dict(row)
    for name, value in row.items():
        if isinstance(value, dict) and value.keys() == {'bytes', 'path'} and value['bytes'] is None and value['path']:
            with fsspec.open(value['path'], 'rb') as file:
                filled[name] = {'bytes': file.read(), 'path': os.path.basename(value['path'])}
    return filled


def _size(row: Row) -> list[int] | None:
    """(height, width) as the columns of these names say, where there are."""
    try:
        size = [int(row['height']), int(row['width'])]
    except (KeyError, TypeError, ValueError):
        return None
    return size if min(size) > 0 else None
