from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Missed(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    NOBODY: _ClassVar[Missed]
    NEXT: _ClassVar[Missed]
    HEAD: _ClassVar[Missed]

class RowType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    F32: _ClassVar[RowType]
    F16: _ClassVar[RowType]
    I8: _ClassVar[RowType]
NOBODY: Missed
NEXT: Missed
HEAD: Missed
F32: RowType
F16: RowType
I8: RowType

class DescribeRequest(_message.Message):
    __slots__ = ("protocol", "types")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TYPES_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    types: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., types: _Optional[_Iterable[str]] = ...) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("protocol", "name", "version", "held_by", "device", "unix_seconds")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    UNIX_SECONDS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    name: str
    version: str
    held_by: str
    device: str
    unix_seconds: float
    def __init__(self, protocol: _Optional[int] = ..., name: _Optional[str] = ..., version: _Optional[str] = ..., held_by: _Optional[str] = ..., device: _Optional[str] = ..., unix_seconds: _Optional[float] = ...) -> None: ...

class EchoRequest(_message.Message):
    __slots__ = ("data", "n_reply")
    DATA_FIELD_NUMBER: _ClassVar[int]
    N_REPLY_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    n_reply: int
    def __init__(self, data: _Optional[bytes] = ..., n_reply: _Optional[int] = ...) -> None: ...

class EchoReply(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ToNode(_message.Message):
    __slots__ = ("open", "chunk", "connect", "beat")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    CONNECT_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    chunk: Chunk
    connect: Connect
    beat: Beat
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., connect: _Optional[_Union[Connect, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ...) -> None: ...

class FromNode(_message.Message):
    __slots__ = ("want", "loaded", "connected", "beat", "failure")
    WANT_FIELD_NUMBER: _ClassVar[int]
    LOADED_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    want: Want
    loaded: Loaded
    connected: Connected
    beat: Beat
    failure: Failure
    def __init__(self, want: _Optional[_Union[Want, _Mapping]] = ..., loaded: _Optional[_Union[Loaded, _Mapping]] = ..., connected: _Optional[_Union[Connected, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "session", "head", "windows", "n_context", "n_sequences", "n_batch", "cache_type", "row_type", "is_disk_used", "neighbours")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    WINDOWS_FIELD_NUMBER: _ClassVar[int]
    N_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    N_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    N_BATCH_FIELD_NUMBER: _ClassVar[int]
    CACHE_TYPE_FIELD_NUMBER: _ClassVar[int]
    ROW_TYPE_FIELD_NUMBER: _ClassVar[int]
    IS_DISK_USED_FIELD_NUMBER: _ClassVar[int]
    NEIGHBOURS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session: bytes
    head: str
    windows: _containers.RepeatedCompositeFieldContainer[WindowFile]
    n_context: int
    n_sequences: int
    n_batch: int
    cache_type: str
    row_type: RowType
    is_disk_used: bool
    neighbours: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., session: _Optional[bytes] = ..., head: _Optional[str] = ..., windows: _Optional[_Iterable[_Union[WindowFile, _Mapping]]] = ..., n_context: _Optional[int] = ..., n_sequences: _Optional[int] = ..., n_batch: _Optional[int] = ..., cache_type: _Optional[str] = ..., row_type: _Optional[_Union[RowType, str]] = ..., is_disk_used: _Optional[bool] = ..., neighbours: _Optional[_Iterable[str]] = ...) -> None: ...

class WindowFile(_message.Message):
    __slots__ = ("hop", "n_gpu_layers", "header", "parts", "source_name", "source_bytes")
    HOP_FIELD_NUMBER: _ClassVar[int]
    N_GPU_LAYERS_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_BYTES_FIELD_NUMBER: _ClassVar[int]
    hop: int
    n_gpu_layers: int
    header: bytes
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    source_name: str
    source_bytes: int
    def __init__(self, hop: _Optional[int] = ..., n_gpu_layers: _Optional[int] = ..., header: _Optional[bytes] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., source_name: _Optional[str] = ..., source_bytes: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("sha256", "n_bytes", "source_offset")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    N_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_OFFSET_FIELD_NUMBER: _ClassVar[int]
    sha256: bytes
    n_bytes: int
    source_offset: int
    def __init__(self, sha256: _Optional[bytes] = ..., n_bytes: _Optional[int] = ..., source_offset: _Optional[int] = ...) -> None: ...

class Want(_message.Message):
    __slots__ = ("window", "part", "offset")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    window: int
    part: int
    offset: int
    def __init__(self, window: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("window", "part", "offset", "data")
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    window: int
    part: int
    offset: int
    data: bytes
    def __init__(self, window: _Optional[int] = ..., part: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Connect(_message.Message):
    __slots__ = ("host", "port", "certificate", "other_hosts")
    HOST_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    OTHER_HOSTS_FIELD_NUMBER: _ClassVar[int]
    host: str
    port: int
    certificate: str
    other_hosts: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, host: _Optional[str] = ..., port: _Optional[int] = ..., certificate: _Optional[str] = ..., other_hosts: _Optional[_Iterable[str]] = ...) -> None: ...

class Loaded(_message.Message):
    __slots__ = ("n_received_bytes",)
    N_RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    n_received_bytes: int
    def __init__(self, n_received_bytes: _Optional[int] = ...) -> None: ...

class Connected(_message.Message):
    __slots__ = ("link_seconds", "link_bytes_per_second")
    LINK_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LINK_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    link_seconds: float
    link_bytes_per_second: float
    def __init__(self, link_seconds: _Optional[float] = ..., link_bytes_per_second: _Optional[float] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("busy_seconds", "is_held")
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IS_HELD_FIELD_NUMBER: _ClassVar[int]
    busy_seconds: float
    is_held: bool
    def __init__(self, busy_seconds: _Optional[float] = ..., is_held: _Optional[bool] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("text", "is_busy", "missed")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    IS_BUSY_FIELD_NUMBER: _ClassVar[int]
    MISSED_FIELD_NUMBER: _ClassVar[int]
    text: str
    is_busy: bool
    missed: Missed
    def __init__(self, text: _Optional[str] = ..., is_busy: _Optional[bool] = ..., missed: _Optional[_Union[Missed, str]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("number", "hop", "operations", "spans", "rows")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HOP_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    number: int
    hop: int
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    rows: Rows
    def __init__(self, number: _Optional[int] = ..., hop: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("source", "target", "n_tokens")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    source: int
    target: int
    n_tokens: int
    def __init__(self, source: _Optional[int] = ..., target: _Optional[int] = ..., n_tokens: _Optional[int] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("sequence", "position", "n_tokens")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    N_TOKENS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    position: int
    n_tokens: int
    def __init__(self, sequence: _Optional[int] = ..., position: _Optional[int] = ..., n_tokens: _Optional[int] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("type", "data", "scales")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    type: RowType
    data: bytes
    scales: bytes
    def __init__(self, type: _Optional[_Union[RowType, str]] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...
