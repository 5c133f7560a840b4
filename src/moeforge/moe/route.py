"""What a router hands to the experts: weighted edges from tokens to experts.

Legend for the package: T tokens, B batch, L length, D d_model, H d_expert, E experts, K top_k, N edges, S slots.
Nothing is padded to a capacity, and an edge of weight zero is never created by a selector. Only while ``torch.compile``
traces, where the number of edges must not depend on the data, a route may end in padding: edges past ``ends[-1]``, of
weight zero and nobody's, which ``expert_mlp`` computes no rows for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeforge.kernels import sum_by_token


@dataclass(frozen=True)
class Route:
    """N edges sorted by expert, stable (ties in token order). ``weight`` is the only differentiable field."""

    token: Tensor
    """[N] int64: source row."""
    weight: Tensor
    """[N] float32: combine weight."""
    ends: Tensor
    """[E] int32: inclusive end of each expert's segment (the offsets of a grouped matmul)."""
    num_tokens: int
    """T."""
    top_k: int | None = None
    """K when every token has exactly K edges: combine is then a permutation and a sum over K."""
    slot: Tensor | None = None
    """[N] int64: t*K+k, set with ``top_k``."""
    carry: Tensor | None = None
    """[T] float32: weight of the identity expert (copy, skip, dropped). It costs no rows."""
    probe: Tensor | None = None
    """[T, D]: zeros added to the layer's routed output, for a loss that wants the gradient there."""
    auxiliary: Tensor | None = None
    """[T, E]: shares, one in all, of chosen experts that do not run: of their vectors, which rows are multiplied with
    before the others read them."""

    @classmethod
    def from_top_k(cls, ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> "Route":
        """Every token to K experts, distinct per token."""
        num_tokens, top_k = ids_TK.shape
        slot_N, ends_E = _sort_by_expert(ids_TK.flatten(), num_experts)
        token_N = slot_N // top_k if top_k > 1 else slot_N
        return cls(token_N, weights_TK.flatten()[slot_N], ends_E, num_tokens, top_k, slot_N)

    @classmethod
    def from_mask(
        cls, mask_TE: Tensor, weights_TE: Tensor, carry_T: Tensor | None = None, most: int | None = None
    ) -> "Route":
        """An edge wherever the mask is true: any number of experts per token, none included, at most ``most``."""
        if torch.compiler.is_compiling():
            return cls._from_mask_padded(mask_TE, weights_TE, carry_T, most or mask_TE.shape[1])
        expert_N, token_N = mask_TE.T.nonzero(as_tuple=True)  # expert-major as it comes: no sort
        ends_E = mask_TE.sum(0).cumsum(0).to(torch.int32)
        return cls(token_N, weights_TE[token_N, expert_N], ends_E, len(mask_TE), carry=carry_T)

    @classmethod
    def _from_mask_padded(cls, mask_TE: Tensor, weights_TE: Tensor, carry_T: Tensor | None, most: int) -> "Route":
        """``most`` edges per token: what a token does not use has the padding id E, which sorts behind all experts."""
        chosen_TK, ids_TK = mask_TE.to(torch.uint8).sort(dim=1, descending=True, stable=True)
        chosen_TK, ids_TK = chosen_TK[:, :most].bool(), ids_TK[:, :most]
        weights_TK = torch.where(chosen_TK, weights_TE.gather(1, ids_TK), 0)
        padded_TK = torch.where(chosen_TK, ids_TK, mask_TE.shape[1])
        slot_N, ends_F = _sort_by_expert(padded_TK.flatten(), mask_TE.shape[1] + 1)
        return cls(slot_N // most, weights_TK.flatten()[slot_N], ends_F[:-1], len(mask_TE), carry=carry_T)

    @classmethod
    def from_expert_choice(cls, token_EC: Tensor, weights_EC: Tensor, num_tokens: int) -> "Route":
        """Each expert names its own C tokens."""
        num_experts, chosen = token_EC.shape
        ends_E = torch.arange(chosen, chosen * num_experts + 1, max(chosen, 1), device=token_EC.device)
        ends_E = ends_E if chosen else torch.zeros(num_experts, device=token_EC.device)
        token_EC, order_EC = token_EC.sort(dim=1, stable=True)
        return cls(token_EC.flatten(), weights_EC.gather(1, order_EC).flatten(), ends_E.to(torch.int32), num_tokens)

    @classmethod
    def from_sorted(cls, ends_E: Tensor, num_rows: int) -> "Route":
        """Rows that are sorted by expert already, each an edge of weight one to itself."""
        order_N = torch.arange(num_rows, device=ends_E.device)
        ones_N = torch.ones(num_rows, device=ends_E.device)
        return cls(order_N, ones_N, ends_E, num_rows, top_k=1, slot=order_N)

    @classmethod
    def from_edges(
        cls, token_N: Tensor, expert_N: Tensor, weight_N: Tensor, num_tokens: int, num_experts: int
    ) -> "Route":
        """Any edges in any order."""
        by_token_N = token_N.argsort(stable=True)
        order_N, ends_E = _sort_by_expert(expert_N[by_token_N], num_experts)
        order_N = by_token_N[order_N]
        return cls(token_N[order_N], weight_N[order_N], ends_E, num_tokens)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.ends)

    @property
    def counts(self) -> Tensor:
        """[E] int64: edges per expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()

    @property
    def expert(self) -> Tensor:
        """[N] int64: the expert of each edge; E for padding."""
        row_N = torch.arange(len(self.token), device=self.ends.device)
        return torch.searchsorted(self.ends.long(), row_N, right=True)

    def gather(self, x: Tensor) -> Tensor:
        """[T, ...] -> [N, ...]: each edge's source row, of any tensor with T rows."""
        return x.index_select(0, self.token)

    def combine(self, rows_ND: Tensor, x_TD: Tensor | None = None) -> Tensor:
        """[N, D] expert outputs -> [T, D] weighted sum, plus ``carry`` times x where the route carries."""
        y_TD = sum_by_token(rows_ND * self.weight[:, None], self).to(rows_ND.dtype)
        return y_TD if self.carry is None else self.add_carry(y_TD, x_TD)

    def add_carry(self, y_TD: Tensor, x_TD: Tensor | None) -> Tensor:
        """``y + carry * x``, where the route carries."""
        if self.carry is None:
            return y_TD
        if x_TD is None:
            raise ValueError("this route has a carry: combine needs x")
        return y_TD + (self.carry[:, None] * x_TD).to(y_TD.dtype)

    def split(self, sizes: Sequence[int]) -> list["Route"]:
        """One route per group of consecutive experts. The carry stays with the first, so the parts still sum up."""
        if sum(sizes) != self.num_experts:
            raise ValueError(f"sizes {list(sizes)} do not add up to {self.num_experts} experts")
        if len(sizes) == 1:
            return [self]
        part = self._part_padded if torch.compiler.is_compiling() else self._part
        parts, first_expert = [], 0
        for size in sizes:
            parts.append(part(first_expert, first_expert + size, carry=self.carry if not parts else None))
            first_expert += size
        return parts

    def _part(self, first_expert: int, end_expert: int, carry: Tensor | None) -> "Route":
        low, high = (int(self.ends[expert - 1]) if expert else 0 for expert in (first_expert, end_expert))
        ends_E = self.ends[first_expert:end_expert] - low
        return Route(self.token[low:high], self.weight[low:high], ends_E, self.num_tokens, carry=carry)

    def _part_padded(self, first_expert: int, end_expert: int, carry: Tensor | None) -> "Route":
        """As many edges as before, those of other experts as padding: how many are theirs depends on the data."""
        ends_F = torch.cat([self.ends.new_zeros(1), self.ends])
        low, high = ends_F[first_expert], ends_F[end_expert]
        row_N = torch.arange(len(self.token), device=low.device) + low
        index_N = row_N % len(self.token)
        weight_N = torch.where(row_N < high, self.weight[index_N], 0)
        return Route(
            self.token[index_N], weight_N, self.ends[first_expert:end_expert] - low, self.num_tokens, carry=carry
        )

    @staticmethod
    def cat(routes: Sequence["Route"]) -> "Route":
        """The routes of disjoint expert sets over the same tokens as one. Carries add up."""
        if len({route.num_tokens for route in routes}) != 1:
            raise ValueError("routes over different numbers of tokens cannot be joined")
        routes = [route._part(0, route.num_experts, route.carry) for route in routes]  # without padding
        lengths = [len(route.token) for route in routes]
        ends = [route.ends + sum(lengths[:i]) for i, route in enumerate(routes)]
        carries = [route.carry for route in routes if route.carry is not None]
        return Route(
            torch.cat([route.token for route in routes]),
            torch.cat([route.weight for route in routes]),
            torch.cat(ends).to(torch.int32),
            routes[0].num_tokens,
            carry=torch.stack(carries).sum(0) if carries else None,
        )

    def with_weight(self, weight_N: Tensor) -> "Route":
        """The same edges with other combine weights."""
        return replace(self, weight=weight_N)


@dataclass(frozen=True)
class SoftRoute:
    """Dense mixing in place of edges (Soft MoE, arXiv:2308.00951): every slot reads and writes every token."""

    dispatch: Tensor
    """[T, S] float32: how much of each token a slot's input takes; columns sum to one."""
    mix: Tensor
    """[T, S] float32: how much of each slot's output a token takes; rows sum to one."""
    ends: Tensor
    """[E] int32: inclusive end of each expert's slots."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.dispatch)

    def gather(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [S, D] mixed inputs."""
        return (self.dispatch.T @ x_TD.to(self.dispatch.dtype)).to(x_TD.dtype)

    def combine(self, rows_SD: Tensor, x_TD: Tensor | None = None) -> Tensor:
        """[S, D] expert outputs -> [T, D]. A soft route carries nothing, so ``x`` is not read."""
        return (self.mix @ rows_SD.to(self.mix.dtype)).to(rows_SD.dtype)

    def split(self, sizes: Sequence[int]) -> list["SoftRoute"]:
        """One soft route per group of consecutive experts."""
        if sum(sizes) != len(self.ends):
            raise ValueError(f"sizes {list(sizes)} do not add up to {len(self.ends)} experts")
        if len(sizes) == 1:
            return [self]
        parts, first_expert, low = [], 0, 0
        for size in sizes:
            ends_E = self.ends[first_expert : first_expert + size]
            high = int(ends_E[-1]) if size else low
            parts.append(SoftRoute(self.dispatch[:, low:high], self.mix[:, low:high], ends_E - low))
            first_expert, low = first_expert + size, high
        return parts

    @property
    def counts(self) -> Tensor:
        """[E] int64: slots per expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).long()


def expert_of(ends_E: Tensor, num_rows: int) -> Tensor:
    """[N] int64: the expert of each row of a list sorted by expert; of rows past the end, the last expert."""
    row_N = torch.arange(num_rows, device=ends_E.device)
    return torch.searchsorted(ends_E[:-1].long(), row_N, right=True)


def _sort_by_expert(expert_N: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [N], ends [E]) of a stable sort by expert; narrow keys sort several times faster."""
    key = expert_N.to(torch.uint8 if num_experts <= 256 else torch.int32)
    sorted_N, order_N = key.sort(stable=True)
    experts_E = torch.arange(num_experts, device=key.device, dtype=torch.int32)
    ends_E = torch.searchsorted(sorted_N.to(torch.int32), experts_E, right=True)
    return order_N, ends_E.to(torch.int32)
