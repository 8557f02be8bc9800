"""A small Hugging Face Hub on localhost, for the tests and the demo.

It speaks the part of the Hub's HTTP API that the official clients use to create, read, upload,
tag and review repos. Blobs live on disk; repos, refs and the request log live in memory.
"""

from localhub.access import Token
from localhub.errors import HubError
from localhub.repos import Commit, Discussion, Entry, Repo
from localhub.server import LocalHub
from localhub.wire import Request

__all__ = ["Commit", "Discussion", "Entry", "HubError", "LocalHub", "Repo", "Request", "Token"]
