"""The faults of a cache, by name. Wrong arguments are ValueError and TypeError, as everywhere."""


class CacheError(RuntimeError):
    """Any of the errors below."""


class CacheFormatError(CacheError):
    """No cache, one of another version of the format, or an index that is damaged or no file."""


class MissingShardError(CacheError):
    """A shard that the index names is not there, or no file."""


class TruncatedShardError(CacheError):
    """A shard is shorter than it was when it was closed."""


class ChecksumError(CacheError):
    """Bytes are not those that were written."""


class IdentityMismatchError(CacheError):
    """The cache is of another teacher, temperature or K than the one that was asked for."""


class VocabularyMismatchError(IdentityMismatchError):
    """The cache's ids are those of another tokenizer or vocabulary: they would mean other tokens."""


class CacheLockedError(CacheError):
    """Another writer has the cache open, or this one is that of the process from which this process was forked."""
