"""A stand-in for the module `ray`: its actors work in this process, each call when waited for."""

from types import SimpleNamespace


class Ended(Exception):  # noqa: N818
    """Raised in an actor, it ends the actor, as SIGKILL does where actors are processes."""


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Method:
    def __init__(self, actor, name):
        self.actor, self.name = actor, name

    def remote(self, *given):
        return lambda: getattr(self.actor.instance, self.name)(*given)


class Actor:
    def __init__(self, made, given):
        self.instance = made(*given)
        self.prepare, self.score = Method(self, "prepare"), Method(self, "score")


class Ray:
    """As many actors as there is room for on two cores."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, **resources):
        self.resources, self.results = resources or {"CPU": 2.0}, {}

    def cluster_resources(self):
        return self.resources

    def remote(self, made):
        create = SimpleNamespace(remote=lambda *given: Actor(made, given))
        return SimpleNamespace(options=lambda **resources: create)

    def wait(self, calls, num_returns):
        return calls[:1], calls[1:]

    def get(self, call):
        try:
            call()
        except Ended:
            raise RayError("The actor died.\nMore.") from None
        except Exception as error:
            raise RayTaskError(error) from None

    def kill(self, actor):
        del actor.instance
