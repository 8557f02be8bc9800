"""Who is asking, and what their token lets them do."""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from localhub.errors import HubError

Role = Literal["read", "write", "fineGrained"]


@dataclass(frozen=True)
class Token:
    """An access token of a user.

    `orgs` are the organizations the user may write to. `scope` is for fine-grained tokens only:
    the namespaces and repo ids the token may write to, by default the user's own namespace.
    """

    value: str = field(repr=False)
    user: str
    role: Role = "write"
    orgs: Sequence[str] = ()
    scope: Sequence[str] | None = None

    def is_member(self, namespace: str) -> bool:
        """Whether the user owns the namespace or belongs to the organization of that name."""
        return namespace == self.user or namespace in self.orgs

    def may_write(self, target: str) -> bool:
        """Whether the token may write to a target: a namespace or a repo id."""
        namespace = target.partition("/")[0]
        if not self.is_member(namespace):
            return False
        if self.role == "fineGrained":
            return bool({target, namespace} & set(self._scope))
        return self.role == "write"

    def may_contribute(self, repo_id: str) -> bool:
        """Whether the token may open a pull request in a repo that its user can read."""
        return self.role == "write" or self.may_write(repo_id)

    def whoami(self) -> dict[str, Any]:
        """The body of GET /api/whoami-v2."""
        access: dict[str, Any] = {"displayName": "localhub", "role": self.role}
        if self.role == "fineGrained":
            scoped = [
                {"entity": self._entity(name), "permissions": ["repo.content.read", "repo.write"]}
                for name in self._scope
            ]
            access["fineGrained"] = {"global": [], "scoped": scoped}
        return {
            "type": "user",
            "id": self.user,
            "name": self.user,
            "fullname": self.user,
            "orgs": [{"type": "org", "name": org, "roleInOrg": "write"} for org in self.orgs],
            "auth": {"type": "access_token", "accessToken": access},
        }

    @property
    def _scope(self) -> Sequence[str]:
        return (self.user,) if self.scope is None else self.scope

    def _entity(self, name: str) -> dict[str, str]:
        if "/" in name:
            return {"type": "model", "name": name}
        return {"type": "user" if name == self.user else "org", "name": name}


class Tokens:
    """The tokens this Hub knows."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._by_value = {token.value: token for token in tokens}
        self._trusted: set[tuple[str, str]] = set()

    def trust(self, id_token: str, repo_id: str) -> None:
        """Make the job that has this id token a trusted publisher of a repo."""
        self._trusted.add((id_token, repo_id))

    def exchange(self, id_token: str, repo_id: str) -> Token:
        """A new token for that repo alone; HubError 401 for a job that is not trusted with it."""
        if (id_token, repo_id) not in self._trusted:
            raise HubError(401, f"No trusted publisher of {repo_id} matches the id token")
        owner = repo_id.partition("/")[0]
        token = Token(f"hf_jwt_{secrets.token_hex(16)}", owner, role="fineGrained", scope=[repo_id])
        self._by_value[token.value] = token
        return token

    def find(self, authorization: str | None) -> Token | None:
        """The token of an Authorization header, None if there is no header or no such token."""
        if authorization is None:
            return None
        return self._by_value.get(authorization.removeprefix("Bearer "))

    def identify(self, authorization: str | None) -> Token | None:
        """As `find`, but a header with a token that is not known is refused (401)."""
        token = self.find(authorization)
        if token is None and authorization is not None:
            # This very sentence is how clients tell a bad token from a repo they may not see.
            raise HubError(401, "Invalid credentials in Authorization header")
        return token
