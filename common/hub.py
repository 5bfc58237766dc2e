from common.errors import UserError


def explain_hub_error(error, kind, name):
    return UserError(f"{kind} {name}: {error}")


def check_can_push(cfg): ...
def push_to_hub(*a, **k): ...
def model_card(cfg, summary):
    return "x"
