"""The terminal chat: conversations kept, a decode in a thread of its own, screens and widgets over both."""
