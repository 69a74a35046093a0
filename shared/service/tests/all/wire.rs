//! Messages that no proper client sends: a clear error, and other calls go on.

use kiln_api::monitor::ListHealthRequest;
use kiln_service::access::Role;
use kiln_service::client;
use prost::bytes::{Buf, BufMut};
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};

use crate::site::Site;

/// Bytes as they are, for a message.
#[derive(Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, bytes: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let mut bytes = vec![0; buffer.remaining()];
        buffer.copy_to_slice(&mut bytes);
        Ok(Some(bytes))
    }
}

async fn send(channel: &client::Channel, method: &str, bytes: Vec<u8>) -> Result<Vec<u8>, Status> {
    let path: PathAndQuery = format!("/kiln.monitor.v1.MonitorService/{method}").parse().unwrap();
    let mut client = Grpc::new(channel.clone());
    client.ready().await.unwrap();
    client.unary(Request::new(bytes), path, Raw).await.map(tonic::Response::into_inner)
}

/// A field of a key, its wire type and bytes behind a length.
fn field(key: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![key << 3 | 2, u8::try_from(bytes.len()).unwrap()];
    out.extend(bytes);
    out
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_message_is_a_clear_error_and_others_go_on() {
    let site = Site::start().await;
    let operator = site.certificate(Role::Operator);
    let remote = site.channel(Some(&operator), None);
    let local = client::channel(&site.running.socket());
    // A group of a field that nobody knows, opened again and again: 15 << 3 | 3 begins one, 15 << 3 | 4 ends it.
    let nested = |depth: usize| [vec![0x7b; depth], vec![0x7c; depth]].concat();
    for channel in [&remote, &local] {
        for (what, bytes, words) in [
            ("nested deeper than 100", nested(101), "recursion limit"),
            ("nested a million deep", nested(1_000_000), "recursion limit"),
            ("not UTF-8", field(2, b"\xff\xfe"), "UTF-8"),
            ("cut off", vec![0x12, 200, b'x'], "protobuf"),
            ("a number without end", vec![0xff; 64], "protobuf"),
            ("a wrong wire type", vec![2 << 3, 7], "wire type"),
            ("a field numbered 0", vec![0, 0], "protobuf"),
        ] {
            let status = send(channel, "ReportSignal", bytes).await.unwrap_err();
            assert!([Code::Internal, Code::InvalidArgument].contains(&status.code()), "{what}: {status:?}");
            let text = status.message().to_lowercase();
            assert!(text.contains(&words.to_lowercase()), "{what}: {text}");
            send(channel, "ListHealth", Vec::new()).await.unwrap();
        }
        // What a later version may send is no fault of the wire: unknown fields, nested as deep as may be, unknown values of an
        // enum. What such a value means is for who is asked, as the real monitor refuses an unknown remedy.
        for (id, more) in [(b"r1", nested(90)), (b"r2", vec![6 << 3, 77]), (b"r3", field(14, b"later"))] {
            let bytes = [field(1, id), more].concat();
            send(channel, "ReportSignal", bytes).await.unwrap();
        }
    }
    let mut client = site.as_role(Role::Viewer);
    client.list_health(ListHealthRequest::default()).await.unwrap();
    site.stop().await;
}
