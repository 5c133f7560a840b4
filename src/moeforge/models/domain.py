"""Which domain a text to write or to read is of, for models whose gates look that up."""

import torch
from torch import Tensor

from moeforge.config import nearest
from moeforge.errors import UserError
from moeforge.models.decoder import Decoder


def known(model: Decoder, domain: str | None, input_ids: Tensor) -> dict[str, Tensor]:
    """What ``Decoder.forward`` is to be told about [B, L] ids of one domain; a model of a single one needs no name.

    Raises UserError when the model knows no such domain, knows none at all, or several and none is named.
    """
    names = model.config.domains
    if not names:
        if domain is not None:
            raise UserError(f"this model knows no domains: leave '{domain}' out")
        return {}
    if domain is None and len(names) > 1:
        raise UserError(f"this model routes by domain: name one with --domain. Valid: {', '.join(names)}")
    if domain is not None and domain not in names:
        raise UserError(f"there is no domain '{domain}'.{nearest(domain, names)} Valid: {', '.join(names)}")
    return {"domain": torch.full_like(input_ids, names.index(domain) if domain is not None else 0)}
