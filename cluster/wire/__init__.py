"""The generated code of `ring.proto`; never edited by hand."""
