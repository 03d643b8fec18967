"""A captured teacher on disk: top-k ids, log-probabilities and tails of sequences, written once and read at random.

Write with ``TeacherCacheWriter``, which loses no closed shard to a kill and goes on where it stopped; read with
``TeacherCache`` by the number of the sequence, or through a ``DataLoader`` with ``TeacherDataset`` or ``TeacherStream``
and ``collate``. ``ExpectationCacheWriter`` and ``ExpectationCache`` do the same for a teacher's expectations under a
student's head. ``docs/guide/cache.md`` has the format and its guarantees, ``python -m kdkernels cache --help`` the
commands. Needs the packages safetensors and numpy, which importing kdkernels itself does not.
"""

try:
    import numpy as _numpy  # noqa: F401
    import safetensors as _safetensors  # noqa: F401
except ImportError as error:
    raise ImportError(f"kdkernels.cache needs the package {error.name}: pip install numpy safetensors") from error

from kdkernels.cache.codec import ExpectationSequence, TeacherSequence
from kdkernels.cache.dataset import TeacherDataset, TeacherStream, collate
from kdkernels.cache.errors import (
    CacheError,
    CacheFormatError,
    CacheLockedError,
    ChecksumError,
    IdentityMismatchError,
    MissingShardError,
    TruncatedShardError,
    VocabularyMismatchError,
)
from kdkernels.cache.index import Identity, fingerprint, head_fingerprint
from kdkernels.cache.reader import ExpectationCache, TeacherCache
from kdkernels.cache.writer import ExpectationCacheWriter, TeacherCacheWriter

__all__ = [
    "CacheError",
    "CacheFormatError",
    "CacheLockedError",
    "ChecksumError",
    "ExpectationCache",
    "ExpectationCacheWriter",
    "ExpectationSequence",
    "Identity",
    "IdentityMismatchError",
    "MissingShardError",
    "TeacherCache",
    "TeacherCacheWriter",
    "TeacherDataset",
    "TeacherSequence",
    "TeacherStream",
    "TruncatedShardError",
    "VocabularyMismatchError",
    "collate",
    "fingerprint",
    "head_fingerprint",
]
