"""Select: scores [T, E] -> which experts each token goes to. Ties go to the lower expert index, inside the row."""

from moeforge.config import slot
from moeforge.moe.select.adaptive import Confident as Confident
from moeforge.moe.select.adaptive import Threshold as Threshold
from moeforge.moe.select.adaptive import TopP as TopP
from moeforge.moe.select.adaptive import Uncertain as Uncertain
from moeforge.moe.select.auxiliary import Auxiliary as Auxiliary
from moeforge.moe.select.batch import ByImportance as ByImportance
from moeforge.moe.select.batch import ExpertChoice as ExpertChoice
from moeforge.moe.select.batch import Sinkhorn as Sinkhorn
from moeforge.moe.select.batch import Soft as Soft
from moeforge.moe.select.drawn import Draw as Draw
from moeforge.moe.select.fixed import Random as Random
from moeforge.moe.select.fixed import TopK as TopK
from moeforge.moe.select.fixed import TopPerGroup as TopPerGroup
from moeforge.moe.select.grid import ProductKeys as ProductKeys
from moeforge.moe.select.merged import Merged as Merged
from moeforge.moe.select.selector import Selection as Selection
from moeforge.moe.select.selector import Selector as Selector
from moeforge.moe.select.selector import check_groups as check_groups
from moeforge.moe.select.selector import top_k as top_k

Select = slot(
    TopK,
    TopPerGroup,
    Confident,
    TopP,
    Threshold,
    ExpertChoice,
    Uncertain,
    Random,
    Sinkhorn,
    Soft,
    Draw,
    ByImportance,
    Merged,
    ProductKeys,
    Auxiliary,
    default=TopK,
)
