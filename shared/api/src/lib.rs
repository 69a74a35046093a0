//! The gRPC protocol: code generated from `proto/`, and conversions to and from the model.

pub mod convert;

/// Messages, clients and servers, one module for each package.
#[allow(clippy::all, unreachable_pub, missing_docs)]
pub mod kiln {
    pub mod types {
        pub mod v1 {
            include!("generated/kiln.types.v1.rs");
        }
    }
    pub mod audit {
        pub mod v1 {
            include!("generated/kiln.audit.v1.rs");
        }
    }
    pub mod builder {
        pub mod v1 {
            include!("generated/kiln.builder.v1.rs");
        }
    }
    pub mod deployer {
        pub mod v1 {
            include!("generated/kiln.deployer.v1.rs");
        }
    }
    pub mod monitor {
        pub mod v1 {
            include!("generated/kiln.monitor.v1.rs");
        }
    }
    pub mod engine {
        pub mod v1 {
            include!("generated/kiln.engine.v1.rs");
        }
    }
    pub mod events {
        pub mod v1 {
            include!("generated/kiln.events.v1.rs");
        }
    }
}

pub use kiln::audit::v1 as audit;
pub use kiln::builder::v1 as builder;
pub use kiln::deployer::v1 as deployer;
pub use kiln::engine::v1 as engine;
pub use kiln::events::v1 as events;
pub use kiln::monitor::v1 as monitor;
pub use kiln::types::v1 as types;

/// Every file of the protocol, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");
