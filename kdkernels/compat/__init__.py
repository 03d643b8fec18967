"""The losses of other libraries under their own names: their arguments in their order, their defaults and conventions.

One module per library, each a few lines over the public functions, imported by name (``import kdkernels.compat.liger``)
and in need of nothing else, but for the trainers (``trl``, ``transformers``). A docstring says what the convention is,
where it was read, and where the library itself is wrong or this module differs. ``docs/guide/compat.md`` has the tables
"you wrote, write".
"""
