"""The errors of localreason; a message names the value, the limit and the remedy.

LocalReasonError
├── ModelError              a model file cannot be used
│   ├── ModelNotFound       no such file, name or reference
│   ├── ModelBroken         not a GGUF, truncated, or inconsistent
│   └── ModelUnsupported    a sound file that this engine cannot run
├── EngineError             the engine could not do what was asked
│   ├── OutOfMemory         weights or cache do not fit
│   ├── ContextFull         no room in the key-value cache; nothing was changed
│   ├── StateError          a saved sequence state cannot be restored
│   └── DecodeFailed        the native library reported a failure
├── PromptError             a prompt cannot be evaluated as asked
│   ├── PromptTooLong
│   └── TemplateError       the chat template is missing, raises or runs away
├── ControlError            unknown control or parameter, bad value, contradiction
├── InputError              problems or configuration cannot be read
└── OutputError             results cannot be written
"""


class LocalReasonError(Exception):
    """Any failure that a user can be told about in one sentence."""


class ModelError(LocalReasonError):
    """A model file cannot be used."""


class ModelNotFound(ModelError):
    """There is no model file, name or reference like this."""


class ModelBroken(ModelError):
    """The file is not a GGUF, is truncated, or contradicts itself."""


class ModelUnsupported(ModelError):
    """The file is sound, but this engine cannot run it."""


class EngineError(LocalReasonError):
    """The engine could not do what was asked."""


class OutOfMemory(EngineError):
    """Weights or cache do not fit into memory."""


class ContextFull(EngineError):
    """The key-value cache has no room for the batch; the cache is as it was before the call."""


class StateError(EngineError):
    """A saved sequence state cannot be written or restored."""


class DecodeFailed(EngineError):
    """The native library reported a failure that has no remedy of its own."""


class PromptError(LocalReasonError):
    """A prompt cannot be evaluated as asked."""


class PromptTooLong(PromptError):
    """The prompt does not fit into the context; prompts are never cut silently."""


class TemplateError(PromptError):
    """The chat template is missing, raises, runs away or loses a message."""


class ControlError(LocalReasonError):
    """An unknown control or parameter, a value out of range, or controls that contradict each other."""


class InputError(LocalReasonError):
    """Problems or configuration cannot be read."""


class OutputError(LocalReasonError):
    """Results cannot be written."""
