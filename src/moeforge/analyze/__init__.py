"""Looking inside finished runs: how they learned, who does what, what they write, as numbers, pictures and one page."""

from moeforge.analyze.kinds import kinds_of as kinds_of
from moeforge.analyze.record import Record as Record
from moeforge.analyze.record import Sample as Sample
from moeforge.analyze.record import at_equal_time as at_equal_time
from moeforge.analyze.report import check_packages as check_packages
from moeforge.analyze.report import write_report as write_report
from moeforge.analyze.routing import tally as tally
