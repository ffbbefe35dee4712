//! What is checked, each in one sentence.

use clap::ValueEnum;

/// A thing that the contract asks of a library or of each of its nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Case {
    Loads,
    LoadTime,
    Descriptor,
    UnknownNames,
    Lifecycle,
    MissingInputs,
    WrongInputs,
    WrongParameters,
    ParameterFuzz,
    Outputs,
    InputsUnchanged,
    Repeatable,
    TwoThreads,
    Cancel,
    Progress,
    References,
    HostFault,
}

impl Case {
    /// Those of the library, in the order in which they are checked.
    pub(crate) const OF_LIBRARY: [Self; 4] = [
        Self::Loads,
        Self::LoadTime,
        Self::Descriptor,
        Self::UnknownNames,
    ];

    /// Those of every node, in the order in which they are checked.
    pub(crate) const OF_NODE: [Self; 13] = [
        Self::Lifecycle,
        Self::MissingInputs,
        Self::WrongInputs,
        Self::WrongParameters,
        Self::ParameterFuzz,
        Self::Outputs,
        Self::InputsUnchanged,
        Self::Repeatable,
        Self::TwoThreads,
        Self::Cancel,
        Self::Progress,
        Self::References,
        Self::HostFault,
    ];

    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Loads => "loads",
            Self::LoadTime => "load-time",
            Self::Descriptor => "descriptor",
            Self::UnknownNames => "unknown-names",
            Self::Lifecycle => "lifecycle",
            Self::MissingInputs => "missing-inputs",
            Self::WrongInputs => "wrong-inputs",
            Self::WrongParameters => "wrong-parameters",
            Self::ParameterFuzz => "parameter-fuzz",
            Self::Outputs => "outputs",
            Self::InputsUnchanged => "inputs-unchanged",
            Self::Repeatable => "repeatable",
            Self::TwoThreads => "two-threads",
            Self::Cancel => "cancel",
            Self::Progress => "progress",
            Self::References => "references",
            Self::HostFault => "host-fault",
        }
    }

    /// One sentence.
    pub(crate) fn description(self) -> &'static str {
        match self {
            Self::Loads => {
                "The library opens, its table and its types fit this host, and it describes its nodes."
            }
            Self::LoadTime => "Opening the library and describing its nodes takes less than 5 s.",
            Self::Descriptor => {
                "The description is the same at every call; names are there once, defaults fit their bounds, and everything is explained."
            }
            Self::UnknownNames => {
                "Classes and extensions that do not exist give an error or nothing, also where a known name stands in them."
            }
            Self::Lifecycle => {
                "A node is made, asked for its fingerprint and dropped 100 times without an error, and its memory comes back."
            }
            Self::MissingInputs => "Without a required input the node returns an error.",
            Self::WrongInputs => {
                "Values of another type on a required input are an error; other shapes, element types, NaN, huge numbers and unknown inputs never a crash or a panic."
            }
            Self::WrongParameters => {
                "Parameters that are no JSON, of another type, out of bounds or unknown never end in a crash or a panic."
            }
            Self::ParameterFuzz => {
                "Random parameters, within their bounds and beyond, never end in a crash or a panic; --seed gives the same ones again."
            }
            Self::Outputs => {
                "The node returns as many outputs as it declares, of the declared types, with finite numbers in pictures, masks and maps."
            }
            Self::InputsUnchanged => {
                "The node runs on inputs in memory that cannot be written, and leaves them as they were."
            }
            Self::Repeatable => "The same inputs, twice, give the same bytes.",
            Self::TwoThreads => {
                "Two nodes of the class that run at once on two threads, while the plugin is described, give what one gives alone."
            }
            Self::Cancel => {
                "A node that is asked to stop, before its run or within it, is done or returns Canceled within --cancel-limit, 500 ms."
            }
            Self::Progress => {
                "Progress stays within 0..1, comes in measure, previews are pictures, and nothing is told after the run."
            }
            Self::References => {
                "When the run, its outputs and the node are gone, nothing holds its inputs or its host."
            }
            Self::HostFault => {
                "A host's service that panics ends the run with the host's own error."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_is_checked_once_and_goes_by_the_name_of_the_command_line() {
        let checked: Vec<_> = Case::OF_LIBRARY.iter().chain(&Case::OF_NODE).collect();
        assert_eq!(
            checked,
            Case::value_variants().iter().collect::<Vec<_>>(),
            "in one order"
        );
        for case in checked {
            assert_eq!(Case::from_str(case.name(), false), Ok(*case));
            assert!(case.description().ends_with('.'));
        }
    }
}
