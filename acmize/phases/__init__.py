"""The phases that turn a converted model into a trained one; each can be read alone, all share `_loop.fit`."""
