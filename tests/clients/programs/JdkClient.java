// java.net.http.HttpClient with its defaults, which offer an upgrade to HTTP/2.

import java.io.ByteArrayOutputStream;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

class JdkClient {
    private static final String BOUNDARY = "b7a46f09d3c6b5a4";
    private static final HttpClient CLIENT = HttpClient.newHttpClient();

    public static void main(String[] arguments) throws Exception {
        Path image = Path.of(arguments[0]);
        HttpResponse<String> accepted = submit(image, "{\"order\": \"4711\"}", "\"jdk\"");
        String path = accepted.headers().firstValue("Location").orElseThrow();
        String task = CLIENT.send(request(path).header("Prefer", "wait").build(), BodyHandlers.ofString()).body();
        CLIENT.send(request(find(task, "href")).build(), BodyHandlers.ofFile(Path.of(arguments[1])));
        String problem = submit(image, "no JSON", "\"jdk-2\"").body();
        System.out.printf(
            "{\"scale\": %s, \"order\": \"%s\", \"code\": \"%s\", \"fields\": [\"%s\"]}%n",
            find(task, "scale"), find(task, "order"), find(problem, "code"), find(problem, "field"));
    }

    private static HttpResponse<String> submit(Path image, String metadata, String key) throws Exception {
        ByteArrayOutputStream body = new ByteArrayOutputStream();
        body.write((field("scale") + "\r\n\r\n3\r\n" + field("metadata") + "\r\n\r\n" + metadata + "\r\n").getBytes());
        body.write((field("image") + "; filename=\"a.png\"\r\n\r\n").getBytes());
        body.write(Files.readAllBytes(image));
        body.write(("\r\n--" + BOUNDARY + "--\r\n").getBytes());
        HttpRequest request = request("/v1/tasks/upscale")
            .header("Content-Type", "multipart/form-data; boundary=" + BOUNDARY)
            .header("Idempotency-Key", key)
            .POST(BodyPublishers.ofByteArray(body.toByteArray()))
            .build();
        return CLIENT.send(request, BodyHandlers.ofString());
    }

    private static String field(String name) {
        return "--" + BOUNDARY + "\r\nContent-Disposition: form-data; name=\"" + name + "\"";
    }

    private static HttpRequest.Builder request(String path) {
        return HttpRequest.newBuilder(URI.create(System.getenv("GATEWAY_URL") + path))
            .header("Authorization", "Bearer " + System.getenv("GATEWAY_TOKEN"));
    }

    private static String find(String json, String name) {
        Matcher matcher = Pattern.compile("\"" + name + "\":\"?([^\",}]*)").matcher(json);
        if (!matcher.find()) {
            throw new AssertionError(json);
        }
        return matcher.group(1);
    }
}
