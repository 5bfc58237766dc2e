from common.errors import UserError


def explain_hub_error(error, kind, name):
    return UserError(f"{kind} {name}: {error}")
